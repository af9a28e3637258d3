"""A transform that changes every tensor: only memory is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import inputs
from benchmarks.measuring import MIB, in_child, scratch
from benchmarks.rows.conversions import NAMES, monolith
from benchmarks.settings import Group, Settings
from benchmarks.table import Goal, Row


@dataclass(frozen=True)
class CastTo:
    """The cast of a ``.pt`` checkpoint, written in the format of a suffix."""

    suffix: str

    @property
    def goal(self) -> Goal:
        """Anonymous memory, over a process with torch imported and the largest tensor."""
        return Goal.memory(f".pt → {NAMES[self.suffix]}, cast")

    def measure(self, settings: Settings) -> Iterator[Row]:
        """Measure the cast once: memory hardly varies."""
        source, target = monolith(settings.folder, settings.sizes.cast_gib), settings.folder / f"b{self.suffix}"
        with scratch(source, target):
            found = in_child("converting.convert", source=source, target=target, transforms=["cast"], copy=())
        yield Row(self.goal, tuple(added - inputs.LARGEST / MIB for added in found["added"]))


CASTS = tuple(CastTo(suffix) for suffix in (".pt", ".safetensors", ".modular"))
GROUPS = tuple(Group((each.goal,), each.measure) for each in CASTS)
