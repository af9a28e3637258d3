"""The JSON Schemas of everything that is printed or written as JSON."""

from __future__ import annotations

from typing import Any

from vraxion_ckpt.catalogue import Description, PluginList
from vraxion_ckpt.changes import Difference
from vraxion_ckpt.checking import Checked
from vraxion_ckpt.errors import UsageError
from vraxion_ckpt.facts import Facts
from vraxion_ckpt.inplace import Edited
from vraxion_ckpt.inspection import Inspection
from vraxion_ckpt.manifest import Manifest
from vraxion_ckpt.recipe import Ran
from vraxion_ckpt.reporting import Reported
from vraxion_ckpt.summary import Summary

SCHEMAS: dict[str, type[Facts]] = {
    facts.kind_of_facts: facts
    for facts in (Summary, Edited, Ran, Inspection, Difference, Checked, Manifest, Reported, PluginList, Description)
}


def schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of what a command prints with ``--json``.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in SCHEMAS:
        raise UsageError(f"there is no schema {name!r}", hint=f"one of {', '.join(SCHEMAS)}")
    return SCHEMAS[name].published_schema()
