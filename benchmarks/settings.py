"""What a run measures: sizes, the number of repeats, the folder to work in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine import GIB
from benchmarks.table import Goal, Row


@dataclass(frozen=True)
class Sizes:
    """Sizes of the checkpoints that are measured. Each is an option; these defaults make a run short."""

    gib: float = field(default=0.25, metadata={"help": "GiB to convert"})
    cast_gib: float = field(default=0.25, metadata={"help": "GiB to cast"})
    limited_gib: float = field(default=1.0, metadata={"help": "GiB to convert in a limited address space"})
    experts: int = field(default=256, metadata={"help": "experts to inspect, edit, open and split"})
    losses: int = field(default=100_000, metadata={"help": "losses in the payload"})
    ring: int = field(default=1_000_000, metadata={"help": "addresses of the ring"})
    repeat: int = field(default=3, metadata={"help": "repeats of each measurement"})

    @property
    def room(self) -> int:
        """The largest number of bytes that a measurement writes, roughly."""
        return int(GIB * max(4 * self.gib, 2 * self.cast_gib, 2.2 * self.limited_gib))


FULL = Sizes(gib=2, cast_gib=4, limited_gib=2, experts=4096, losses=1_000_000, ring=10_000_000)


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        folder: an empty folder for all files.
        scale_folder: an empty folder for the row that writes more than the machine's memory; None skips the row.
    """

    sizes: Sizes
    folder: Path
    scale_folder: Path | None = None


@dataclass(frozen=True)
class Group:
    """Rows that are measured together."""

    goals: tuple[Goal, ...]
    measure: Callable[[Settings], Iterable[Row]]
