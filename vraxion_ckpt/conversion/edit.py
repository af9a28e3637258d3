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
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Unpack

from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.comparison import without_experts
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.plain_data import size_of
from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.commit.manifest import by_name
from vraxion_ckpt.commit.staging import Staged, check_target, exclusive, staged
from vraxion_ckpt.commit.transaction import mark_of, survey
from vraxion_ckpt.conversion.edit_plan import EditKind, EditPlan, plan_edit, refuse_unwritable
from vraxion_ckpt.conversion.stage_results import (
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
from vraxion_ckpt.conversion.targets import SideTarget, check_inputs, check_manifest, check_several, say_what_names_deny
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
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter, IncrementalDirectoryAdapter
from vraxion_ckpt.plugins.discovery import AdapterLike, TransformLike, resolve_adapter, resolve_chain
from vraxion_ckpt.plugins.lent_tensors import SourceTensors
from vraxion_ckpt.plugins.transform import Step
from vraxion_ckpt.reading.opening import (
    OptimizerPolicy,
    PathLike,
    check_allowed,
    detect_source,
    files_of,
    os_errors_named,
    read_with,
    refuse,
)
from vraxion_ckpt.reading.read_options import ReadKeywords, ReadOptions
from vraxion_ckpt.support import signals


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


@memory_errors()
def edit(
    path: PathLike,
    *,
    transforms: Sequence[TransformLike] = (),
    to: AdapterLike | None = None,
    losses: LossPolicy = "raise",
    keep_old: bool = False,
    dry_run: bool = False,
    manifest: PathLike | None = None,
    result_order: Sequence[str] | None = None,
    optimizer: OptimizerPolicy = "keep",
    companions: CompanionPolicy = "grow",
    **reading: Unpack[ReadKeywords],
) -> Edited:
    """Run a chain of transforms on a checkpoint in place; or raise, and leave it as it was.

    Without a chain it only finishes or undoes what an interrupted run has left.

    Args:
        path: a file or a directory.
        transforms: as for `convert`.
        to: the same format, with options for writing.
        losses: as for `convert`.
        keep_old: leave the previous state beside it, under its name with ``.old``.
        dry_run: do everything but write.
        manifest: a file for the digests of every file of the new state; an older manifest there is replaced.
        result_order: as for `convert`.
        optimizer: as for `convert`.
        companions: as for `convert`.
        reading: as for `convert`.

    Returns:
        What was done.

    Raises:
        CkptError: one subclass for each kind of reason, see `vraxion_ckpt.errors`.
        BusyError: another run is at work on it.
    """
    started = time.monotonic()
    options, policy = ReadOptions(**reading), chain_policy(companions, result_order)
    with signals.deferred(), os_errors_named(path, *([] if manifest is None else [manifest])), ExitStack() as stack:
        with signals.interruptible():
            check_policy(losses)
            chain = resolve_chain(transforms)
            target = _existing(path)
            adapter = _writer(target, options, to)
            if not dry_run:
                check_target(target, overwrite=True)
                stack.enter_context(exclusive(target))
            marks = survey(target)
            reopen = partial(read_with, target, options, optimizer)
            before = reopen()
            lent = SourceTensors(before, reopen)
            _refuse_a_part(target, before)
            idle = not chain and optimizer in ("keep", "partial") and to is None and result_order is None
            if not idle:
                check_complete(before, optimizer)
            outcome = judge(apply(before, chain, lent, policy=policy), adapter, target, losses, overwrite=False)
            listed = _manifest_place(manifest, outcome, target, chain, keep_old=keep_old)
            if listed is not None:
                before.open_experts()  # a manifest lists only what was read
            _check_side_targets(target, chain, outcome, listed)
            refuse(
                InconsistentError, invariants.invariant_findings(before), target
            )  # also of experts that the chain has opened
            plan = plan_edit(adapter, target, before, outcome.held, marks, keep_old=keep_old, idle=idle)
            job = _Edit(adapter, options.allow_globals, target, outcome, lent, plan, listed, keep_old)
            staging = job.measure() if dry_run else job.stage(stack)
        kept = job.publish(staging)
        return Edited(
            source=target,
            target=target,
            target_format=adapter.name,
            tensors=job.count_tensors(),
            manifest=listed.path if listed is not None else None,
            bytes_written=staging.sizes[0],
            seconds=time.monotonic() - started,
            dry_run=dry_run,
            **outcome.facts(dropped=optimizer == "drop"),
            kind=plan.kind,
            written=plan.written,
            removed=plan.removed,
            untouched=plan.untouched,
            kept=kept,
        )


def _existing(path: PathLike) -> Path:
    target = Path(os.path.realpath(path))
    if not target.exists():
        raise UsageError("no such file or directory", path=path)
    if not target.name:
        raise UsageError("is no place to edit", path=path)
    return target


def _check_side_targets(target: Path, chain: Sequence[Step], outcome: Outcome, listed: SideTarget | None) -> None:
    """Refuse files beside the target that must not be written where they are to go."""
    side_targets = [*outcome.side_targets, *([listed] if listed is not None else [])]
    written = [target, *(each.path for each in side_targets)]
    check_several(written)
    check_inputs(written, chain, outcome.side_files, set())
    say_what_names_deny((), side_targets)


def _writer(target: Path, options: ReadOptions, to: AdapterLike | None) -> Adapter:
    """Return the adapter that writes the checkpoint back."""
    found = detect_source(target, options.from_)
    check_allowed(found, options.allow_globals)
    if adapter_calls.is_directory(found) and not target.is_dir():
        _refuse_a_part(target, adapter_calls.call_read(found, target, options.allow_globals))
    adapter = resolve_adapter(to) if to is not None else found
    if adapter.name != found.name:
        message = f"is of the format {found.name}, which an edit in place keeps"
        raise UsageError(message, path=target, hint=f"use convert to a new path for {adapter.name}")
    if target.is_dir() and adapter_calls.foreign_files(adapter, target) is None:
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
) -> SideTarget | None:
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


@dataclass(frozen=True)
class _Edit:
    """An edit that was checked: what is to be done to which files."""

    adapter: Adapter
    allow_globals: Sequence[str]
    target: Path
    outcome: Outcome
    lent: SourceTensors
    plan: EditPlan
    listed: SideTarget | None
    keep_old: bool

    def measure(self) -> Staging:
        """Return how many bytes a dry run would write: at least those of the tensors, if a format cannot tell."""
        if self.plan.kind is EditKind.NOTHING:
            return Staging(sizes=[0])
        self.outcome.before.sources.verify()
        held, plan = self.outcome.held, self.plan
        if plan.files:
            size: int | None = sum(plan.files[name].size() for name in plan.written)
        else:
            size = adapter_calls.size(self.adapter, held)
        if size is None:
            size = size_of([held.state_dict(), held.payload, held.optimizer.state if held.optimizer else {}])
        return Staging(sizes=[size + plan.copied + sum(map(len, self.outcome.side_files.values()))])

    def stage(self, stack: ExitStack) -> Staging:
        """Stage what changes, read it back and compare."""
        refuse_unwritable(self.target, self.plan)
        if self.plan.kind is EditKind.NOTHING:
            return Staging(sizes=[0]) if self.listed is None else self._stage_manifest_alone(stack, self.listed)
        before, held, plan, target = self.outcome.before, self.outcome.held, self.plan, self.target
        stage = stack.enter_context(staged(target, directory=target.is_dir(), overwrite=True, change=plan.change))
        if plan.files:
            for name in plan.written:
                (stage.path / name).parent.mkdir(parents=True, exist_ok=True)
                plan.files[name].write(stage.path / name)
        else:
            write_whole(self.adapter, before, held, stage)
        sides = stage_side_files(stack, self.outcome.side_files, self.outcome.side_targets)
        new = by_name(stage.path, files_below(stage.path))
        written = [*new.values(), *(side.path for side in sides)]
        size = plan.copied + sum(path.stat().st_size for path in written)
        for name in plan.carried:
            _carry(target / name, stage.path / name, copy=self.keep_old)
        self._read_back(stage)
        files = {name: new.get(name, target / name) for name in plan.files} or new
        manifest = stage_manifest(stack, self.listed, self.adapter, files, target)
        before.sources.verify()  # what was not carried into the result, too
        before.sources.check_unchanged()
        return Staging([(stage, manifest)], sides, [size])

    def _stage_manifest_alone(self, stack: ExitStack, place: SideTarget) -> Staging:
        """Stage the manifest of a checkpoint that stays as it is."""
        before = self.outcome.before
        files = files_of(self.adapter, self.target, before.origin.leftovers)
        manifest = stage_manifest(stack, place, self.adapter, by_name(self.target, files), self.target)
        assert manifest is not None
        before.sources.verify()
        before.sources.check_unchanged()
        return Staging([], [manifest], [manifest.path.stat().st_size])

    def _read_back(self, stage: Staged) -> None:
        """Read the new state as anyone would, and compare what has changed with what it was made from."""
        with quietly():
            if self.plan.change.pivot != "." and isinstance(self.adapter, IncrementalDirectoryAdapter):
                removed = self.plan.removed
                found = adapter_calls.read_overlay(self.adapter, self.target, stage.path, removed, self.allow_globals)
            else:
                found = adapter_calls.call_read(self.adapter, stage.path, self.allow_globals)
                found.open_experts()  # those that stay as they are, too
        check_read_back(self.adapter, found, self.outcome.held, self.lent, self.target, untouched=self._untouched())

    def publish(self, staging: Staging) -> Path | None:
        """Put everything in its place, the target last but for its manifest; return where the old state is kept."""
        kept, plan = None, self.plan
        with staging.as_one():
            for side in staging.sides:
                side.publish()
            for stage, manifest in staging.targets:
                watched = dict(plan.watched)
                for name in plan.watched.keys() - plan.files.keys() if plan.carried else ():
                    linked = mark_of(stage.path / name)
                    if linked and linked[0] == watched[name][0]:  # a foreign file: a write to it is in both states
                        watched[name] = linked[:1]
                kept = publish(stage, manifest, watched=watched, keep_old=self.keep_old)
        return kept

    def count_tensors(self) -> TensorCount:
        """Count what became of the model's tensors."""
        if self.plan.kind is EditKind.NOTHING:
            return TensorCount()
        same = self._untouched()
        return count_tensors(without_experts(self.outcome.before, same), without_experts(self.outcome.held, same))

    def _untouched(self) -> set[int]:
        """Return the experts that are the same object before and after: they are in files that stay as they are."""
        before, held = self.outcome.before.head, self.outcome.held.head
        if not self.plan.files or before is None or held is None:
            return set()
        return {i for i, expert in held.experts.items() if before.experts.get(i) is expert}


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
