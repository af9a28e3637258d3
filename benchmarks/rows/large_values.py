"""Checkpoints with many small tensors, long lists, or a long ring."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks import inputs
from benchmarks.measuring import in_child, scratch
from benchmarks.settings import Group, Settings
from benchmarks.table import Goal, Row, ratios

OPEN = Goal("open, many experts / torch.load(mmap)", 0.3)
SPLIT_MANY = Goal("split, many experts / naive", 0.5)
LOSSES = Goal("losses: split / torch.load, torch.save", 1)
LOSSES_MEMORY = Goal("losses: split, memory / file", 8)
MORE_LOSSES_MEMORY = Goal("4.9 × losses: split, memory / file", 8)
RING = {
    name: (Goal(f"ring: {name} / numpy", 20), Goal(f"ring: {name}, memory / map", 4))
    for name in ("inspect", "diff", "check")
}
PLAN = Goal("ring: arc_meta, mitosis_split / cumsum", 40)


def many_experts(settings: Settings) -> Iterator[Row]:
    """Measure opening and splitting thousands of small tensors."""
    sizes, source, target = settings.sizes, settings.folder / "many.pt", settings.folder / "b.pt"
    with scratch(source):
        in_child("inputs.many_experts", path=source, experts=sizes.experts)
        found = in_child("looking.open_many", path=source, repeat=sizes.repeat)
        yield ratios(OPEN, found["ours"], found["others"])
        transforms = [inputs.split(sizes.experts, 16 * sizes.experts)]
        found = in_child(
            "converting.convert",
            source=source,
            target=target,
            transforms=transforms,
            repeat=sizes.repeat,
            copy=(),
            by_hand=True,
        )
        yield ratios(SPLIT_MANY, found["ours"], found["hand"])


def losses(settings: Settings) -> Iterator[Row]:
    """Measure a split of a checkpoint with a long list of numbers."""
    source, target = settings.folder / "losses.pt", settings.folder / "b.pt"
    with scratch(source):
        in_child("inputs.with_losses", path=source, losses=settings.sizes.losses)
        found = in_child("looking.split_losses", source=source, target=target, repeat=settings.sizes.repeat)
        yield ratios(LOSSES, found["ours"], found["others"])
        yield Row(LOSSES_MEMORY, (in_child("looking.memory_by_size", source=source, target=target),))


def more_losses(settings: Settings) -> Iterator[Row]:
    """Measure the memory of a split with a list that is 4.9 times as long."""
    source, target = settings.folder / "losses.pt", settings.folder / "b.pt"
    with scratch(source):
        in_child("inputs.with_losses", path=source, losses=settings.sizes.losses * 49 // 10)
        yield Row(MORE_LOSSES_MEMORY, (in_child("looking.memory_by_size", source=source, target=target),))


def ring(command: str, settings: Settings) -> Iterator[Row]:
    """Measure a command on a ring whose owner changes at each address."""
    source, other, numbers, tiny = (settings.folder / name for name in ("ring.pt", "b.pt", "ring.npy", "tiny.pt"))
    time, memory = RING[command]
    with scratch(source, other, numbers, tiny):
        in_child("inputs.with_ring", path=source, ring=settings.sizes.ring)
        in_child("inputs.with_ring", path=other, ring=settings.sizes.ring, moved=True)
        in_child("inputs.with_ring", path=tiny, ring=64)
        size = in_child("looking.save_router_map", path=source, numbers=numbers)
        found = in_child(
            "looking.look",
            command=command,
            path=source,
            other=other,
            numbers=numbers,
            tiny=tiny,
            repeat=settings.sizes.repeat,
        )
    yield ratios(time, found["ours"], found["others"])
    yield Row(memory, tuple(added / size for added in found["added"]))


def planning(settings: Settings) -> Iterator[Row]:
    """Measure the plan of a split of such a ring, and the split."""
    source = settings.folder / "ring.pt"
    with scratch(source):
        in_child("inputs.with_ring", path=source, ring=settings.sizes.ring)
        found = in_child("looking.plan", path=source, folder=settings.folder, repeat=settings.sizes.repeat)
    yield ratios(PLAN, found["ours"], found["others"])


GROUPS = (
    Group((OPEN, SPLIT_MANY), many_experts),
    Group((LOSSES, LOSSES_MEMORY), losses),
    Group((MORE_LOSSES_MEMORY,), more_losses),
    *(Group(goals, partial(ring, command)) for command, goals in RING.items()),
    Group((PLAN,), planning),
)
