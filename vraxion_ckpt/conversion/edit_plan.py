"""Find out which files an edit in place has to write, and in which order."""

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
from vraxion_ckpt.errors import UsageError
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter, IncrementalDirectoryAdapter, OutputFile


class EditKind(StrEnum):
    """How the new state takes the old one's place.

    NOTHING: there was nothing to change.
    REPLACE: the checkpoint is one file, and is replaced.
    ROUTER_ONLY: of a directory, the pivot alone changes.
    GROW: files are added that whoever reads the old pivot does not look at; then the pivot changes.
    SHRINK: the pivot changes; then files go that whoever reads the new pivot does not look at.
    REWRITE: everything else: a whole new directory, exchanged with the old one.
    """

    NOTHING = "nothing"
    REPLACE = "replace"
    ROUTER_ONLY = "router only"
    GROW = "grow"
    SHRINK = "shrink"
    REWRITE = "rewrite"


@dataclass(frozen=True)
class EditPlan:
    """What an edit has to do to the files of a checkpoint.

    Attributes:
        files: of the new state, the files that can be written one by one; empty where only the whole can.
        written: which of them change.
        carried: what else the new state holds, if it is staged as a whole: unchanged files, and other people's.
        copied: how many bytes of that must be copied.
        untouched: how many files of the checkpoint stay as they are.
        watched: what must not change meanwhile.
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
    before: Checkpoint,
    held: Checkpoint,
    marks: Mapping[str, Mark],
    *,
    keep_old: bool,
    idle: bool,
) -> EditPlan:
    """Find out which files differ, and by that the kind of the edit."""
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
        copied = _bytes_of_files(target, marks.keys() - ours.keys()) if keep_old else 0
        return EditPlan(EditKind.REWRITE, carried=(*sorted(left), *others), copied=copied, watched=marks)
    index = adapter.index_file
    old = {name: file for name, file in adapter_calls.output_files(adapter, before).items() if name in ours}
    new = adapter_calls.output_files(adapter, held)
    same = {name for name, file in new.items() if name in old and old[name].content == file.content}
    written = tuple(name for name in new if name not in same)
    removed = tuple(name for name in old if name not in new)
    rest = tuple(name for name in (*written, *removed) if name != index)
    for name in written:
        if name not in old and os.path.lexists(target / name) and not stat.S_ISREG((target / name).lstat().st_mode):
            message = "is no regular file, and has the name of a file of the new state"
            raise UsageError(message, path=target / name, hint="move it away, or use convert to a new path")

    def ignored_by(reader: Checkpoint) -> bool:
        return all(adapter_calls.is_ignored(adapter, name, before, held, reader) for name in rest)

    work = EditPlan(EditKind.REWRITE, FileChanges(), new, written, removed, untouched=len(same), watched=watched)
    in_place = index in written and index in old and not keep_old
    if in_place and not rest:
        return replace(work, kind=EditKind.ROUTER_ONLY, change=FileChanges(index))
    if in_place and not removed and ignored_by(before):
        return replace(work, kind=EditKind.GROW, change=FileChanges(index, first=rest))
    if in_place and all(name in old for name in rest) and ignored_by(held):
        later = tuple(name for name in rest if name in new)
        return replace(work, kind=EditKind.SHRINK, change=FileChanges(index, later=later, removed=removed))
    kept = left - new.keys()
    copied = _bytes_of_files(target, same | kept | (marks.keys() - watched.keys())) if keep_old else 0
    return replace(work, carried=(*sorted(same | kept), *others), copied=copied, watched=marks)


def refuse_unwritable(target: Path, work: EditPlan) -> None:
    """Refuse before a byte is written what would fail, or go wrong, when files are put in place."""
    here = Path.cwd()
    if work.kind is EditKind.REWRITE and (here == target or target in here.parents):
        message = "is, or holds, the current directory, which would be another one afterwards"
        raise UsageError(message, path=target, hint="cd out of it")
    names = (*work.change.first, *work.change.later, *work.change.removed)
    for folder in sorted({(target / name).parent for name in (work.change.exchanged, *names) if name != "."}):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError("the folder is not writable", path=folder)


def _bytes_of_files(target: Path, names: Iterable[str]) -> int:
    found = ((target / name).lstat() for name in names)
    return sum(status.st_size for status in found if stat.S_ISREG(status.st_mode))


def _is_below(name: str, places: Collection[str]) -> bool:
    return name in places or any(str(parent) in places for parent in Path(name).parents)
