"""The state-dict names of a model family's head and router map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache


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
    if not name.startswith(names.experts):
        return None
    number, _, leaf = name[len(names.experts) :].partition(".")
    is_number = len(number) < 10 and number.isascii() and number.isdecimal()
    return (int(number), leaf) if is_number and leaf and "\n" not in leaf else None


@dataclass(frozen=True)
class SplitNames:
    """A list of parameter names, split into experts and leaves.

    Attributes:
        experts: the ids of the experts that have each leaf.
        others: all other names, including those in which an id has leading zeros.
    """

    experts: Mapping[str, set[int]]
    others: tuple[str, ...]


@lru_cache(8)  # the lists before and after a chain are asked for again and again
def split_names(listed: tuple[str, ...], names: HeadNames) -> SplitNames:
    """Split the names of parameters of a list of experts."""
    experts: dict[str, set[int]] = {}
    others = []
    for name in listed:
        found = split_name(name, names)
        if found is not None and name == f"{names.experts}{found[0]}.{found[1]}":
            experts.setdefault(found[1], set()).add(found[0])
        else:
            others.append(name)
    return SplitNames(experts, tuple(others))
