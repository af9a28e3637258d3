"""Commands as whole processes against the import of torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import in_child, run, scratch, timed
from benchmarks.settings import Group, Settings
from benchmarks.table import Goal, Row, ratios

TORCH = (sys.executable, "-c", "import torch")
COMMAND = (sys.executable, "-m", "vraxion_ckpt.cli")
SHARD = round(100e9 / 4096)  # bytes of each expert of the large checkpoint
SMALL = Goal("inspect, small / import torch", 0.3)
LARGE = Goal("inspect, many experts / import torch", 0.6)
CONVERT = Goal("convert with a split / import torch", 1.15)


def _compared(goal: Goal, repeat: int, arguments: Sequence[str | Path], code: int = 0, *targets: Path) -> Row:
    """Run a command and import torch in turn. Remove `targets` after each run."""

    def command() -> float:
        with scratch(*targets):
            return timed(lambda: run(*COMMAND, *arguments, code=code))

    command()  # warms up
    pairs = [(command(), timed(lambda: run(*TORCH))) for _ in range(repeat)]
    return ratios(goal, [ours for ours, _ in pairs], [others for _, others in pairs])


def _small(settings: Settings, measure: Callable[[Path], Row]) -> Iterator[Row]:
    source = settings.folder / "small.pt"
    with scratch(source):
        in_child("inputs.with_losses", path=source, losses=10)
        yield measure(source)


def inspect_small(settings: Settings) -> Iterator[Row]:
    """Inspect a small checkpoint."""
    repeat = settings.sizes.repeat
    yield from _small(settings, lambda source: _compared(SMALL, repeat, ["inspect", source]))


def convert_small(settings: Settings) -> Iterator[Row]:
    """Split a small checkpoint."""
    target = settings.folder / "b.pt"

    def measure(source: Path) -> Row:
        arguments: list[str | Path] = ["convert", source, target, "-t", "mitosis_split:parent=0,addresses=[0]"]
        return _compared(CONVERT, settings.sizes.repeat, arguments, 0, target)

    yield from _small(settings, measure)


def inspect_large(settings: Settings) -> Iterator[Row]:
    """Inspect a large checkpoint whose shards are sparse: 100 GB with 4,096 experts."""
    root, experts = settings.folder / "many", settings.sizes.experts
    with scratch(root):
        in_child("inputs.directory", root=root, experts=experts, size=experts * SHARD)
        yield _compared(LARGE, settings.sizes.repeat, ["inspect", root])


@dataclass(frozen=True)
class WithoutFiles:
    """A command that opens no checkpoint."""

    name: str
    arguments: tuple[str, ...]
    code: int = 0

    @property
    def goal(self) -> Goal:
        """Time against the import of torch."""
        return Goal(f"{self.name} / import torch", 0.1)

    def measure(self, settings: Settings) -> Iterator[Row]:
        """Measure the command."""
        yield _compared(self.goal, settings.sizes.repeat, self.arguments, self.code)


WITHOUT_FILES = (
    WithoutFiles("--help", ("--help",)),
    WithoutFiles("--version", ("--version",)),
    WithoutFiles("a usage error", ("convert",), 2),
)
GROUPS = (
    Group((SMALL,), inspect_small),
    Group((CONVERT,), convert_small),
    Group((LARGE,), inspect_large),
    *(Group((each.goal,), each.measure) for each in WITHOUT_FILES),
)
