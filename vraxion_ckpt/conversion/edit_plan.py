"""Plan which files an edit in place writes and removes, and in which order."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.commit.file_marks import Mark
from vraxion_ckpt.commit.journal import FileChanges
from vraxion_ckpt.conversion.summary import Outcome
from vraxion_ckpt.errors import UsageError
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter, IncrementalDirectoryAdapter, OutputFile


class EditKind(StrEnum):
    """How the new state replaces the old one.

    NOTHING: nothing changes.
    REPLACE: the checkpoint is one file, which is replaced.
    ROUTER_ONLY: only the index file of a directory changes.
    GROW: files that readers of the old index file ignore are added, then the index file is replaced.
    SHRINK: the index file is replaced, then files that readers of the new index file ignore are removed.
    REWRITE: any other change: a new directory is written and exchanged with the old one.
    """

    NOTHING = "nothing"
    REPLACE = "replace"
    ROUTER_ONLY = "router only"
    GROW = "grow"
    SHRINK = "shrink"
    REWRITE = "rewrite"


@dataclass(frozen=True)
class EditPlan:
    """The file operations of an edit. Paths are relative to the checkpoint.

    Attributes:
        change: the order of the operations around the commit.
        files: every file of the new state; empty if the format can only write a checkpoint as a whole.
        written: files that are written.
        removed: files that are removed.
        carried: unchanged and foreign files that are linked or copied if the new state is staged as a whole.
        copied: bytes of carried files that are copied.
        untouched: number of files of the checkpoint that do not change.
        watched: files that must not change before the commit.
    """

    kind: EditKind
    change: FileChanges = field(default_factory=FileChanges)
    files: Mapping[str, OutputFile] = field(default_factory=dict)
    written: tuple[str, ...] = (".",)
    removed: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    copied: int = 0
    untouched: int = 0
    watched: Mapping[str, Mark] = field(default_factory=dict)


def plan_edit(
    adapter: Adapter,
    target: Path,
    outcome: Outcome,
    marks: Mapping[str, Mark],
    *,
    keep_old: bool,
    idle: bool,
) -> EditPlan:
    """Determine which files differ, and from this the kind of the edit.

    Args:
        adapter: writes the new state.
        target: the checkpoint.
        outcome: the checkpoint before the edit, and the one to write.
        marks: the state of every file below `target`.
        keep_old: whether the previous state is kept.
        idle: whether nothing is to be changed.

    Raises:
        UsageError: the path of a new file is taken by something other than a regular file.
    """
    before, held = outcome.before, outcome.held
    foreign = set()
    if target.is_dir():
        foreign = {os.path.relpath(path, target) for path in adapter_calls.foreign_files(adapter, target) or ()}
    others = tuple(sorted(name for name in foreign if not _is_below(str(Path(name).parent), foreign)))
    left = set(before.origin.leftovers)
    watched = {name: mark for name, mark in marks.items() if not foreign or not _is_below(name, foreign)}
    ours = {name: mark for name, mark in watched.items() if name not in left}
    if idle:
        return EditPlan(EditKind.NOTHING, written=(), untouched=len(ours))
    if not target.is_dir():
        return EditPlan(EditKind.REPLACE, watched=marks)
    if not isinstance(adapter, IncrementalDirectoryAdapter):
        kept = left | {neighbour.name for neighbour in outcome.neighbours.carried}
        copied = _bytes_of_files(target, kept | (marks.keys() - watched.keys())) if keep_old else 0
        gone = tuple(neighbour.name for neighbour in outcome.neighbours.stale)
        carried = (*sorted(kept), *others)
        return EditPlan(EditKind.REWRITE, removed=gone, carried=carried, copied=copied, watched=marks)
    old = {name: file for name, file in adapter_calls.output_files(adapter, before).items() if name in ours}
    new = adapter_calls.output_files(adapter, held)
    _refuse_occupied(target, new.keys() - old.keys())
    same = adapter_calls.same_files(adapter, old, new)
    written = tuple(name for name in new if name not in same)
    removed = tuple(name for name in old if name not in new)
    plan = EditPlan(EditKind.REWRITE, FileChanges(), new, written, removed, untouched=len(same), watched=watched)
    if not keep_old and adapter.index_file in old and (stepwise := _stepwise(adapter, plan, before, held, old)):
        return stepwise
    kept = left - new.keys()
    copied = _bytes_of_files(target, same | kept | (marks.keys() - watched.keys())) if keep_old else 0
    return replace(plan, carried=(*sorted(same | kept), *others), copied=copied, watched=marks)


def _stepwise(
    adapter: IncrementalDirectoryAdapter, plan: EditPlan, before: Checkpoint, held: Checkpoint, old: Collection[str]
) -> EditPlan | None:
    """Return the plan with an order that lets readers see only the old or the new state; None if there is none."""
    index = adapter.index_file
    rest = tuple(name for name in (*plan.written, *plan.removed) if name != index)

    def ignored_by(reader: Checkpoint) -> bool:
        return all(adapter_calls.is_ignored(adapter, name, before, held, reader) for name in rest)

    if index not in plan.written:
        return None
    if not rest:
        return replace(plan, kind=EditKind.ROUTER_ONLY, change=FileChanges(index))
    if not plan.removed and ignored_by(before):
        return replace(plan, kind=EditKind.GROW, change=FileChanges(index, first=rest))
    if all(name in old for name in rest) and ignored_by(held):
        later = tuple(name for name in rest if name in plan.files)
        return replace(plan, kind=EditKind.SHRINK, change=FileChanges(index, later=later, removed=plan.removed))
    return None


def _refuse_occupied(target: Path, new: Iterable[str]) -> None:
    for name in new:
        if os.path.lexists(target / name) and not stat.S_ISREG((target / name).lstat().st_mode):
            message = "is not a regular file, but has the name of a file of the new state"
            raise UsageError(message, path=target / name, hint="move it away, or use convert to a new path")


def refuse_unwritable(target: Path, work: EditPlan) -> None:
    """Check, before anything is written, that the files can be put in place.

    Raises:
        UsageError: a folder is not writable, or the directory to exchange contains the current directory.
    """
    here = Path.cwd()
    if work.kind is EditKind.REWRITE and (here == target or target in here.parents):
        message = "is or contains the current directory, which the edit would replace"
        raise UsageError(message, path=target, hint="change to another directory")
    names = (*work.change.first, *work.change.later, *work.change.removed)
    for folder in sorted({(target / name).parent for name in (work.change.exchanged, *names) if name != "."}):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError("the folder is not writable", path=folder)


def _bytes_of_files(target: Path, names: Iterable[str]) -> int:
    found = ((target / name).lstat() for name in names)
    return sum(status.st_size for status in found if stat.S_ISREG(status.st_mode))


def _is_below(name: str, places: Collection[str]) -> bool:
    return name in places or any(str(parent) in places for parent in Path(name).parents)
