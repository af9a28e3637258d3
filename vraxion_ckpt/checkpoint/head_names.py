"""Where a model family keeps its head in the state dict, and what the names of the head's tensors say."""

from __future__ import annotations

import re
from dataclasses import dataclass

_EXPERT = re.compile(r"([0-9]{1,9})\.(.+)")


@dataclass(frozen=True)
class HeadNames:
    """Where a model family keeps its head and its router map in the state dict."""

    single: str = "head.single."
    experts: str = "head.experts."
    router_map: str = "router_map"


VRAXION = HeadNames()


def split_name(name: str, names: HeadNames) -> tuple[int, str] | None:
    """Return the expert and the leaf of a parameter's name, or None for one outside the head; a single head is 0."""
    if name.startswith(names.single):
        return 0, name.removeprefix(names.single)
    found = _EXPERT.fullmatch(name.removeprefix(names.experts)) if name.startswith(names.experts) else None
    return (int(found[1]), found[2]) if found else None
