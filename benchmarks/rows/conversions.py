"""Conversions between all formats against `cp`, and the main one also against the naive way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import inputs
from benchmarks.machine import GIB, NoFileSystemError, busy_core, shared_blocks
from benchmarks.measuring import MIB, Found, in_child, remove, scratch
from benchmarks.settings import Group, Settings
from benchmarks.table import Goal, Row, ratios, skipped

MAIN = ".pt → .pt, split"
VERSUS_COPY = Goal(f"{MAIN} / cp", 1.2)
BY_HAND = Goal(f"{MAIN} / naive", 0.3)
BUSY = Goal(f"{MAIN} / cp, one core busy", None)
MEMORY = Goal.memory(MAIN)
ALL_PAIRS = Goal.memory("all pairs of formats")
SHARED = Goal(f"{MAIN}, shared blocks / cp", 0.5)
NAMES = {".pt": ".pt", ".safetensors": "safetensors", ".modular": "modular", ".shards": "shards"}


@dataclass(frozen=True)
class Pair:
    """A conversion without transforms, between the formats of two suffixes."""

    source: str
    target: str

    @property
    def goals(self) -> tuple[Goal, Goal]:
        """Time and memory."""
        what = f"{NAMES[self.source]} → {NAMES[self.target]}"
        return Goal(f"{what} / cp", 1.2), Goal.memory(what)

    def measure(self, settings: Settings) -> Iterator[Row]:
        """Measure the conversion of a checkpoint that is first brought to the source's format."""
        sizes = settings.sizes
        source, target = monolith(settings.folder, sizes.gib), settings.folder / f"b{self.target}"
        if self.source != source.suffix:
            other = source.with_suffix(self.source)
            in_child("converting.convert_once", source=source, target=other)
            remove(source)
            source = other
        with scratch(source):
            found = in_child("converting.convert", source=source, target=target, repeat=sizes.repeat)
        time, memory = self.goals
        yield ratios(time, found["ours"], found["copy"])
        yield Row(memory, tuple(found["added"]))


def monolith(folder: Path, gib: float) -> Path:
    """Write the checkpoint to convert, and return its path."""
    path = folder / "a.pt"
    in_child("inputs.monolith", path=path, gib=gib)
    return path


def split(settings: Settings) -> Iterator[Row]:
    """Measure the main conversion, also with another core busy."""
    sizes, source, target = settings.sizes, monolith(settings.folder, settings.sizes.gib), settings.folder / "b.pt"
    with scratch(source):
        found = _split(source, target, sizes.repeat, by_hand=True)
        yield ratios(VERSUS_COPY, found["ours"], found["copy"])
        yield ratios(BY_HAND, found["ours"], found["hand"])
        yield Row(MEMORY, tuple(added - inputs.CREATED / MIB for added in found["added"]))
        with busy_core():
            found = _split(source, target, sizes.repeat)
        yield ratios(BUSY, found["ours"], found["copy"])


def split_on_shared_blocks(settings: Settings) -> Iterator[Row]:
    """Measure the main conversion where files can share blocks."""
    try:
        with shared_blocks(settings.folder, int(3 * GIB * settings.sizes.gib)) as folder:
            source = monolith(folder, settings.sizes.gib)
            copy = ("cp", "--reflink=never")
            found = _split(source, folder / "b.pt", settings.sizes.repeat, copy=copy)
            yield ratios(SHARED, found["ours"], found["copy"])
    except NoFileSystemError as error:
        yield from skipped([SHARED], str(error))


def _split(source: Path, target: Path, repeat: int, copy: Sequence[str] = ("cp",), *, by_hand: bool = False) -> Found:
    found: Found = in_child(
        "converting.convert",
        source=source,
        target=target,
        transforms=[inputs.SPLIT],
        repeat=repeat,
        copy=copy,
        by_hand=by_hand,
    )
    return found


def all_pairs(settings: Settings) -> Iterator[Row]:
    """Measure the memory of conversions between all formats, in one process."""
    source = monolith(settings.folder, settings.sizes.gib)
    with scratch(source):
        yield Row(ALL_PAIRS, tuple(in_child("converting.convert_between_all", source=source)))


PAIRS = (
    Pair(".pt", ".safetensors"),
    Pair(".safetensors", ".pt"),
    Pair(".pt", ".modular"),
    Pair(".modular", ".pt"),
    Pair(".safetensors", ".shards"),
    Pair(".shards", ".safetensors"),
)
GROUPS = (
    Group((VERSUS_COPY, BY_HAND, MEMORY, BUSY), split),
    Group((SHARED,), split_on_shared_blocks),
    *(Group(pair.goals, pair.measure) for pair in PAIRS),
    Group((ALL_PAIRS,), all_pairs),
)
