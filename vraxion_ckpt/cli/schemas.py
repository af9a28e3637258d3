"""The JSON Schemas of everything that is printed or written as JSON."""

from __future__ import annotations

from typing import Any

from vraxion_ckpt.analysis.changes import Difference
from vraxion_ckpt.analysis.checking import Checked
from vraxion_ckpt.analysis.inspection_facts import Inspection
from vraxion_ckpt.commit.manifest import Manifest
from vraxion_ckpt.conversion.edit import Edited
from vraxion_ckpt.conversion.summary import Summary
from vraxion_ckpt.errors import UsageError
from vraxion_ckpt.plugins.catalogue import Description, PluginList
from vraxion_ckpt.recipes.recipe import Ran
from vraxion_ckpt.reporting.report import Reported
from vraxion_ckpt.support.json_models import Facts

SCHEMAS: dict[str, type[Facts]] = {
    facts.kind_of_facts: facts
    for facts in (Summary, Edited, Ran, Inspection, Difference, Checked, Manifest, Reported, PluginList, Description)
}


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a command's ``--json`` output, or of a manifest.

    Raises:
        UsageError: there is no schema of that name.
    """
    if name not in SCHEMAS:
        raise UsageError(f"there is no schema {name!r}", hint=f"one of {', '.join(SCHEMAS)}")
    return SCHEMAS[name].published_schema()
