"""Edits in place: a grow of a modular directory with many experts against the same with few."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import inputs
from benchmarks.measuring import in_child, scratch
from benchmarks.settings import Group, Settings
from benchmarks.table import Goal, Row, ratios

FEW = 64
TIME = Goal("edit, grow: many / few experts", 1.5)
READ = Goal("edit, grow: bytes read / needed", 1.1)
WRITTEN = Goal("edit, grow: bytes written / needed", 1.1)
OPENED = Goal("edit, grow: bytes opened / needed", 1.1)
SHARDS = Goal("edit, grow: experts' files opened", 1, "")


def edits(settings: Settings) -> Iterator[Row]:
    """Grow directories with few and many experts in turn. Their router.state has the same size, 1/32 of --gib."""
    sizes = settings.sizes
    many = sizes.experts
    few = min(FEW, many)
    ring = 2 * many * (sizes.repeat + 1)
    core = max(64, round(sizes.gib * 2**30 / 32 / 4 / inputs.WIDTH))
    roots = [(few, settings.folder / "few"), (many, settings.folder / "many")]
    found: list[list[dict[str, float]]] = [[], []]
    with scratch(*(root for _, root in roots)):
        for experts, root in roots:
            in_child("inputs.directory", root=root, experts=experts, size=experts * 2**16, core=core, ring=ring)
        for turn in range(sizes.repeat):
            for (experts, root), runs in zip(roots, found, strict=True):
                runs.append(in_child("editing.grow", root=root, addresses=[2 * experts * turn]))
    with_few, with_many = found
    yield ratios(TIME, [run["seconds"] for run in with_many], [run["seconds"] for run in with_few])
    for goal, key in ((READ, "read"), (WRITTEN, "written"), (OPENED, "opened"), (SHARDS, "shards")):
        yield Row(goal, tuple(run[key] for run in with_many))


GROUPS = (Group((TIME, READ, WRITTEN, OPENED, SHARDS), edits),)
