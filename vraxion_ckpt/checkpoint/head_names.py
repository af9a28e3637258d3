"""The state-dict names of a model family's head and router map."""

from __future__ import annotations

import re
from dataclasses import dataclass

_EXPERT = re.compile(r"([0-9]{1,9})\.(.+)")


@dataclass(frozen=True)
class HeadNames:
    """The prefixes of a single head and of the experts, and the name of the router map."""

    single: str = "head.single."
    experts: str = "head.experts."
    router_map: str = "router_map"


VRAXION = HeadNames()


def split_name(name: str, names: HeadNames) -> tuple[int, str] | None:
    """Return a parameter's expert id (0 for a single head) and leaf name, or None for a parameter outside the head."""
    if name.startswith(names.single):
        return 0, name.removeprefix(names.single)
    found = _EXPERT.fullmatch(name.removeprefix(names.experts)) if name.startswith(names.experts) else None
    return (int(found[1]), found[2]) if found else None
