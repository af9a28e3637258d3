"""Edit: the same flow as a conversion, back to where the checkpoint came from.

::

    path ──lock──▶ Adapter.read ──▶ Checkpoint ──chain──▶ Checkpoint
                   which files differ? ──▶ the kind of the edit, and which of them stand on which side of the commit
                   those files ──▶ staged ──read back over the old ones, compare──▶ flush, commit

The kind is found from what the chain has changed, not from what it is called.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import ClassVar

from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.comparison import without_experts
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.plain_data import size_of
from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.commit.manifest import by_name
from vraxion_ckpt.commit.staging import Staged, check_target, exclusive, staged
from vraxion_ckpt.commit.transaction import Change, Mark, mark_of, survey
from vraxion_ckpt.conversion.convert import (
    Staging,
    check_read_back,
    files_below,
    publish,
    quietly,
    stage_manifest,
    stage_side_files,
    write_whole,
)
from vraxion_ckpt.conversion.summary import Outcome, Summary, TensorCount, count_tensors
from vraxion_ckpt.conversion.targets import Beside, check_inputs, check_manifest, check_several, say_what_names_deny
from vraxion_ckpt.conversion.verify_before_write import (
    LossPolicy,
    apply,
    chain_policy,
    check_complete,
    check_policy,
    judge,
)
from vraxion_ckpt.errors import InconsistentError, UsageError, memory_errors
from vraxion_ckpt.experts.companion_updates import CompanionPolicy
from vraxion_ckpt.optimizer.binding import OptimizerOrder
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter, Part
from vraxion_ckpt.plugins.discovery import AdapterLike, TransformLike, resolve_adapter, resolve_chain
from vraxion_ckpt.plugins.lent_tensors import SourceTensors
from vraxion_ckpt.plugins.transform import Step
from vraxion_ckpt.reading.opening import (
    OptimizerPolicy,
    PathLike,
    allowing,
    detect_source,
    files_of,
    os_errors_named,
    read,
    refuse,
)
from vraxion_ckpt.support import signals


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


class Edited(Summary):
    """What an edit did, or with `dry_run` would do; `bytes_written` is what it writes in either case."""

    kind_of_facts: ClassVar[str] = "edit"

    kind: EditKind = EditKind.NOTHING
    written: tuple[str, ...] = ()
    """Files that are written, by their path below the checkpoint; ``.`` is the checkpoint itself."""
    removed: tuple[str, ...] = ()
    """Files that are gone."""
    untouched: int = 0
    """How many files of the checkpoint stay as they are."""
    kept: Path | None = None
    """Where the previous state is."""


@dataclass(frozen=True)
class _Work:
    """What an edit has to do to the files of a checkpoint.

    Attributes:
        parts: of the new state, the files that can be written one by one; empty where only the whole can.
        written: which of them change.
        carried: what else the new state holds, if it is staged as a whole: unchanged files, and other people's.
        copied: how many bytes of that must be copied.
        untouched: how many files of the checkpoint stay as they are.
        watched: what must not change meanwhile.
    """

    kind: EditKind
    change: Change = field(default_factory=Change)
    parts: Mapping[str, Part] = field(default_factory=dict)
    written: tuple[str, ...] = (".",)
    removed: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    copied: int = 0
    untouched: int = 0
    watched: Mapping[str, Mark] = field(default_factory=dict)


@memory_errors()
def edit(
    path: PathLike,
    *,
    transforms: Sequence[TransformLike] = (),
    from_: AdapterLike | None = None,
    to: AdapterLike | None = None,
    losses: LossPolicy = "raise",
    keep_old: bool = False,
    dry_run: bool = False,
    manifest: PathLike | None = None,
    param_names: Sequence[str] | None = None,
    optimizer_order: OptimizerOrder | None = None,
    result_order: Sequence[str] | None = None,
    optimizer: OptimizerPolicy = "keep",
    companions: CompanionPolicy = "grow",
    allow_globals: Sequence[str] = (),
) -> Edited:
    """Run a chain of transforms on a checkpoint in place; or raise, and leave it as it was.

    Without a chain it only brings to an end what a killed run has left.

    Args:
        path: a file or a directory.
        transforms: as for `convert`.
        from_: as for `read`.
        to: the same format, with options for writing.
        losses: as for `convert`.
        keep_old: leave the previous state beside it, under its name with ``.old``.
        dry_run: do everything but write.
        manifest: a file for the digests of every file of the new state; an older manifest there is replaced.
        param_names: as for `read`.
        optimizer_order: as for `read`.
        result_order: as for `convert`.
        optimizer: as for `convert`.
        companions: as for `convert`.
        allow_globals: as for `read`.

    Raises:
        CkptError: one subclass for each kind of reason, see `vraxion_ckpt.errors`.
        BusyError: another run is at work on it.
    """
    started = time.monotonic()
    with signals.put_off(), os_errors_named(path, *([] if manifest is None else [manifest])), ExitStack() as stack:
        with signals.stoppable():
            check_policy(losses)
            chain = resolve_chain(transforms)
            target = Path(os.path.realpath(path))
            if not target.exists():
                raise UsageError("no such file or directory", path=path)
            if not target.name:
                raise UsageError("is no place to edit", path=path)
            adapter = allowing(_writer(target, from_, to), allow_globals)
            if not dry_run:
                check_target(target, overwrite=True)
                stack.enter_context(exclusive(target))

            marks = survey(target)
            policy = chain_policy(companions, result_order)
            reopen = partial(
                read,
                target,
                from_=from_,
                param_names=param_names,
                optimizer_order=optimizer_order,
                optimizer=optimizer,
                allow_globals=allow_globals,
            )
            before = reopen()
            lent = SourceTensors(before, reopen)
            _refuse_a_part(target, before)
            idle = not chain and optimizer in ("keep", "partial") and to is None and result_order is None
            if not idle:
                check_complete(before, optimizer)
            outcome = judge(apply(before, chain, lent, policy=policy), adapter, target, losses, overwrite=False)
            listed = _manifest_place(manifest, outcome, target, chain, keep_old=keep_old)
            if listed is not None:
                before.open_experts()  # nothing is vouched for that was not read
            besides = [beside.path for beside in (*outcome.besides, *filter(None, [listed]))]
            check_several([target, *besides])
            check_inputs([target, *besides], chain, outcome.side_files, set())
            say_what_names_deny((), (*outcome.besides, *filter(None, [listed])))
            refuse(InconsistentError, invariants.findings(before), target)  # of what the chain has opened, too
            held = outcome.held
            work = _plan(adapter, target, before, held, marks, keep_old=keep_old, idle=idle)
            if not dry_run:
                _refuse_unwritable(target, work)
            tensors, staging = TensorCount(), Staging(sizes=[0])
            if work.kind is not EditKind.NOTHING:
                same = _untouched(work, before, held)
                tensors = count_tensors(without_experts(before, same), without_experts(held, same))
                if dry_run:
                    before.sources.verify()
                    size = _size(adapter, held, work) + sum(map(len, outcome.side_files.values()))
                    staging = Staging(sizes=[size])
                else:
                    staging = _stage(stack, adapter, target, outcome, lent, work, listed, keep_old=keep_old)
            elif listed is not None and not dry_run:
                staging = _stage_list(stack, adapter, target, before, listed)
        kept = _publish(staging, work, keep_old=keep_old)
        return Edited(
            source=target,
            target=target,
            target_format=adapter.name,
            tensors=tensors,
            manifest=listed.path if listed is not None else None,
            bytes_written=staging.sizes[0],
            seconds=time.monotonic() - started,
            dry_run=dry_run,
            **outcome.facts(dropped=optimizer == "drop"),
            kind=work.kind,
            written=work.written,
            removed=work.removed,
            untouched=work.untouched,
            kept=kept,
        )


def _writer(target: Path, from_: AdapterLike | None, to: AdapterLike | None) -> Adapter:
    """Return the adapter that writes the checkpoint back."""
    found = detect_source(target, from_)
    if adapter_calls.is_directory(found) and not target.is_dir():
        _refuse_a_part(target, adapter_calls.read(found, target))
    adapter = resolve_adapter(to) if to is not None else found
    if adapter.name != found.name:
        message = f"is of the format {found.name}, which an edit in place keeps"
        raise UsageError(message, path=target, hint=f"use convert to a new path for {adapter.name}")
    if target.is_dir() and type(adapter).foreign_files is Adapter.foreign_files:
        raise UsageError(
            f"the format {adapter.name} does not tell its own files from others', which would be lost",
            path=target,
            hint="use convert to a new path",
        )
    is_directory = adapter_calls.is_directory(adapter)
    if is_directory != target.is_dir():
        kind = "directory" if is_directory else "file"
        raise UsageError(
            f"with these options {adapter.name} writes a {kind}, and this is none",
            path=target,
            hint=f"say how it is to be written: --to {adapter.name}:key=value, see `vraxion-ckpt describe`",
        )
    return adapter


def _manifest_place(
    manifest: PathLike | None, outcome: Outcome, target: Path, chain: Sequence[Step], *, keep_old: bool
) -> Beside | None:
    if manifest is None:
        return None
    place = check_manifest(Path(manifest), outcome.before, target, chain, outcome.side_files, overwrite=True)
    if keep_old and re.fullmatch(rf"{re.escape(str(target))}\.old[0-9]*", str(place.path)):
        raise UsageError("is where the previous state may be kept", path=manifest, hint="choose another name")
    return place


def _refuse_a_part(target: Path, checkpoint: Checkpoint) -> None:
    root = Path(os.path.realpath(checkpoint.origin.path or target))
    if root != target:
        raise UsageError(f"is a part of the checkpoint {root}", path=target, hint="name that to edit it")


def _plan(
    adapter: Adapter,
    target: Path,
    before: Checkpoint,
    held: Checkpoint,
    marks: Mapping[str, Mark],
    *,
    keep_old: bool,
    idle: bool,
) -> _Work:
    """Find out which files differ, and by that the kind of the edit."""
    foreign = set()
    if target.is_dir():
        foreign = {os.path.relpath(path, target) for path in adapter_calls.foreign_files(adapter, target)}
    others = tuple(sorted(name for name in foreign if not _is_below(str(Path(name).parent), foreign)))
    left = set(before.origin.leftovers)
    watched = {name: mark for name, mark in marks.items() if not foreign or not _is_below(name, foreign)}
    ours = {name: mark for name, mark in watched.items() if name not in left}
    if idle:
        return _Work(EditKind.NOTHING, written=(), untouched=len(ours))
    if not target.is_dir():
        return _Work(EditKind.REPLACE, watched=marks)
    if adapter.pivot is None:
        copied = _bytes_of_files(target, marks.keys() - ours.keys()) if keep_old else 0
        return _Work(EditKind.REWRITE, carried=(*sorted(left), *others), copied=copied, watched=marks)
    old = {name: part for name, part in adapter_calls.parts(adapter, before).items() if name in ours}
    new = adapter_calls.parts(adapter, held)
    same = {name for name, part in new.items() if name in old and old[name].content == part.content}
    written = tuple(name for name in new if name not in same)
    removed = tuple(name for name in old if name not in new)
    rest = tuple(name for name in (*written, *removed) if name != adapter.pivot)
    for name in written:
        if name not in old and os.path.lexists(target / name) and not stat.S_ISREG((target / name).lstat().st_mode):
            message = "is no regular file, and has the name of a file of the new state"
            raise UsageError(message, path=target / name, hint="move it away, or use convert to a new path")

    def unseen_by(reader: Checkpoint) -> bool:
        return all(adapter_calls.unseen(adapter, name, before, held, reader) for name in rest)

    work = _Work(EditKind.REWRITE, Change(), new, written, removed, untouched=len(same), watched=watched)
    in_place = adapter.pivot in written and adapter.pivot in old and not keep_old
    if in_place and not rest:
        return replace(work, kind=EditKind.ROUTER_ONLY, change=Change(adapter.pivot))
    if in_place and not removed and unseen_by(before):
        return replace(work, kind=EditKind.GROW, change=Change(adapter.pivot, first=rest))
    if in_place and all(name in old for name in rest) and unseen_by(held):
        later = tuple(name for name in rest if name in new)
        return replace(work, kind=EditKind.SHRINK, change=Change(adapter.pivot, later=later, removed=removed))
    kept = left - new.keys()
    copied = _bytes_of_files(target, same | kept | (marks.keys() - watched.keys())) if keep_old else 0
    return replace(work, carried=(*sorted(same | kept), *others), copied=copied, watched=marks)


def _refuse_unwritable(target: Path, work: _Work) -> None:
    """Refuse before a byte is written what would fail, or go wrong, when files are put in place."""
    here = Path.cwd()
    if work.kind is EditKind.REWRITE and (here == target or target in here.parents):
        message = "is, or holds, the current directory, which would be another one afterwards"
        raise UsageError(message, path=target, hint="cd out of it")
    names = (*work.change.first, *work.change.later, *work.change.removed)
    for folder in sorted({(target / name).parent for name in (work.change.pivot, *names) if name != "."}):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError("the folder is not writable", path=folder)


def _bytes_of_files(target: Path, names: Iterable[str]) -> int:
    found = ((target / name).lstat() for name in names)
    return sum(status.st_size for status in found if stat.S_ISREG(status.st_mode))


def _is_below(name: str, places: Collection[str]) -> bool:
    return name in places or any(str(parent) in places for parent in Path(name).parents)


def _untouched(work: _Work, before: Checkpoint, held: Checkpoint) -> set[int]:
    """Return the experts that are the same object before and after: they are in files that stay as they are."""
    if not work.parts or before.head is None or held.head is None:
        return set()
    return {i for i, expert in held.head.experts.items() if before.head.experts.get(i) is expert}


def _size(adapter: Adapter, held: Checkpoint, work: _Work) -> int:
    """Return how many bytes would be written; at the least, where a format cannot tell, those of the tensors."""
    told = sum(work.parts[name].size() for name in work.written) if work.parts else adapter_calls.size(adapter, held)
    if told is None:
        slots = held.optimizer.state if held.optimizer else {}
        told = size_of([held.state_dict(), held.payload, slots])
    return told + work.copied


def _stage(
    stack: ExitStack,
    adapter: Adapter,
    target: Path,
    outcome: Outcome,
    lent: SourceTensors,
    work: _Work,
    listed: Beside | None,
    *,
    keep_old: bool,
) -> Staging:
    """Stage what changes, read it back and compare."""
    before, held = outcome.before, outcome.held
    stage = stack.enter_context(staged(target, directory=target.is_dir(), overwrite=True, change=work.change))
    if work.parts:
        for name in work.written:
            (stage.path / name).parent.mkdir(parents=True, exist_ok=True)
            work.parts[name].write(stage.path / name)
    else:
        write_whole(adapter, before, held, stage)
    sides = stage_side_files(stack, outcome.side_files, outcome.besides)
    new = by_name(stage.path, files_below(stage.path))
    written = [*new.values(), *(side.path for side in sides)]
    size = work.copied + sum(path.stat().st_size for path in written)
    for name in work.carried:
        _carry(target / name, stage.path / name, copy=keep_old)
    _read_back(adapter, held, lent, work, stage, _untouched(work, before, held))
    files = {name: new.get(name, target / name) for name in work.parts} or new
    manifest = stage_manifest(stack, listed, adapter, files, target)
    before.sources.verify()  # what was not carried into the result, too
    before.sources.check_unchanged()
    return Staging([(stage, manifest)], sides, [size])


def _stage_list(stack: ExitStack, adapter: Adapter, target: Path, before: Checkpoint, place: Beside) -> Staging:
    """Stage the manifest of a checkpoint that stays as it is."""
    files = files_of(adapter, target, before.origin.leftovers)
    manifest = stage_manifest(stack, place, adapter, by_name(target, files), target)
    assert manifest is not None
    before.sources.verify()
    before.sources.check_unchanged()
    return Staging([], [manifest], [manifest.path.stat().st_size])


def _publish(staging: Staging, work: _Work, *, keep_old: bool) -> Path | None:
    """Put everything in its place, the target last but for its manifest; return where the previous state is kept."""
    kept = None
    with staging.as_one():
        for side in staging.sides:
            side.publish()
        for stage, manifest in staging.targets:
            watched = dict(work.watched)
            for name in work.watched.keys() - work.parts.keys() if work.carried else ():
                linked = mark_of(stage.path / name)
                if linked and linked[0] == watched[name][0]:  # another's: what is written into it is in both states
                    watched[name] = linked[:1]
            kept = publish(stage, manifest, watched=watched, keep_old=keep_old)
    return kept


def _carry(source: Path, target: Path, *, copy: bool) -> None:
    """Give a file, or all files of a folder, a second name in the new state.

    A previous state that is kept must have files of its own: a trainer that writes into one would write into both.
    """
    if source.is_dir() and not source.is_symlink():
        target.mkdir(parents=True, exist_ok=True)
        for entry in source.iterdir():
            _carry(entry, target / entry.name, copy=copy)
    elif os.path.lexists(target):
        message = "is no part of the checkpoint, and has the name of a file of its new state"
        raise UsageError(message, path=source, hint="move it away, or use convert to a new path")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        (system_calls.copy if copy else system_calls.link_or_copy)(source, target)


def _read_back(
    adapter: Adapter, held: Checkpoint, lent: SourceTensors, work: _Work, stage: Staged, untouched: set[int]
) -> None:
    """Read the new state as anyone would, and compare what has changed with what it was made from."""
    in_place = work.change.pivot != "."
    with quietly():
        if in_place:
            found = adapter_calls.read_over(adapter, stage.target, stage.path, work.removed)
        else:
            found = adapter_calls.read(adapter, stage.path)
            found.open_experts()  # those that stay as they are, too
    check_read_back(adapter, found, held, lent, stage.target, untouched=untouched)
