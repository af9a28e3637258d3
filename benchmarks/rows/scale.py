"""Checkpoints larger than memory, and an address space in which only streaming passes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from benchmarks import inputs
from benchmarks.machine import GIB
from benchmarks.measuring import MIB, in_child, memory_of_machine, scratch
from benchmarks.rows.conversions import monolith
from benchmarks.settings import Group, Settings
from benchmarks.table import Goal, Row, skipped

EXPERTS = 1024  # of the checkpoint that is larger than memory
EDITED = Goal.memory("larger than RAM: edit, grow")
CONVERTED = Goal.memory("larger than RAM: split to .pt")
LIMITED = Goal("address space limited: failed splits", 0, "")
LEAST_SPARE = 512 * MIB  # for the stacks and the heaps of threads


def _larger_than_memory() -> int:
    """Return the bytes of a checkpoint that is a quarter larger than the machine's memory."""
    return memory_of_machine() * 5 // 4


def edit(settings: Settings) -> Iterator[Row]:
    """Grow a sparse modular directory in place. Its clone is the only tensor that is created."""
    root, size = settings.folder / "large", _larger_than_memory()
    with scratch(root):
        in_child("inputs.directory", root=root, experts=EXPERTS, size=size)
        found = in_child("editing.grow", root=root, addresses=[0])
    yield Row(EDITED, (found["added"] - size / EXPERTS / MIB,))


def convert(settings: Settings) -> Iterator[Row]:
    """Convert a sparse modular directory to one file, with a split. The file is not sparse."""
    size, folder = _larger_than_memory(), settings.scale_folder
    room = size + size // 8
    if folder is None:
        yield from skipped([CONVERTED], f"it writes {size / GIB:.0f} GiB; to measure it, use --scale FOLDER")
        return
    if shutil.disk_usage(folder).free < room:
        yield from skipped([CONVERTED], f"{folder} has less than {room / GIB:.0f} GiB of free space")
        return
    root, target = folder / "large.modular", folder / "b.pt"
    with scratch(root, target):
        in_child("inputs.directory", root=root, experts=EXPERTS, size=size)
        split = inputs.split(EXPERTS, 16 * EXPERTS)
        found = in_child("converting.convert", source=root, target=target, transforms=[split], copy=())
    yield Row(CONVERTED, tuple(added - size / EXPERTS / MIB for added in found["added"]))


def limited(settings: Settings) -> Iterator[Row]:
    """Split a checkpoint in an address space that has room for half of it, beside what the process has."""
    gib = settings.sizes.limited_gib
    source, target = monolith(settings.folder, gib), settings.folder / "b.pt"
    spare = max(LEAST_SPARE, int(gib * GIB / 2))
    with scratch(source, target):
        failed = in_child(
            "converting.fails_in_limited_space",
            source=source,
            target=target,
            transforms=[inputs.SPLIT],
            spare=spare,
        )
    yield Row(LIMITED, (failed,))


GROUPS = (Group((EDITED,), edit), Group((CONVERTED,), convert), Group((LIMITED,), limited))
