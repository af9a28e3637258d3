"""The state-dict names of a model family's head and router map."""

from __future__ import annotations

from dataclasses import dataclass


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
