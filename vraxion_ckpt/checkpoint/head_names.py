"""The state-dict names of a head with a ring, and of its router map."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

_SINGLE, _EXPERTS, _ROUTER_MAP = "head.single.", "head.experts.", "router_map"
_IN_HEAD = re.compile(rf"(?:.*?\.)??(?={re.escape(_SINGLE)}|{re.escape(_EXPERTS)})", re.DOTALL)


@dataclass(frozen=True)
class HeadNames:
    """The prefixes of a single head and of the experts, and the name of the router map.

    Attributes:
        single: prefix of the tensors of a single head.
        experts: prefix of the tensors of a list of experts; the expert's id follows.
        router_map: name of the router map.
        prefix: what precedes all three, such as the ``module.`` of a wrapper. Other tensors may lack it.
    """

    single: str = _SINGLE
    experts: str = _EXPERTS
    router_map: str = _ROUTER_MAP
    prefix: str = ""

    @classmethod
    def below(cls, prefix: str) -> HeadNames:
        """Return the names below a prefix, which is empty or ends in a dot."""
        return cls(prefix + _SINGLE, prefix + _EXPERTS, prefix + _ROUTER_MAP, prefix)

    def local(self, name: str) -> str:
        """Return a name without the prefix, which copies of the model lack."""
        return name.removeprefix(self.prefix)


RING_HEAD = HeadNames()


def head_prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes of the heads that a state dict with these names has, shortest first."""
    found: dict[str, None] = {}
    for name in names:
        if "head." in name and (match := _IN_HEAD.match(name)):
            found[match[0]] = None
    return sorted(found, key=len)


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
