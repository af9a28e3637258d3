"""Edit a checkpoint in place: a conversion whose target is its source.

::

    path ──lock──▶ Adapter.read ──▶ Checkpoint ──chain──▶ Checkpoint
                   which files differ? ──▶ the kind of the edit, and the order of its file operations
                   those files ──▶ staged ──read back with the unchanged files, compare──▶ flush, commit

The kind of an edit depends on the files that the chain changed, not on the names of the transforms.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import ClassVar, Unpack

from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.commit.file_marks import survey
from vraxion_ckpt.commit.staging import check_target, exclusive
from vraxion_ckpt.conversion.chain import NeighbourPolicy
from vraxion_ckpt.conversion.edit_job import EditJob
from vraxion_ckpt.conversion.edit_plan import EditKind, plan_edit
from vraxion_ckpt.conversion.summary import Outcome, Summary
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
from vraxion_ckpt.plugins.lent_tensors import LentTensors
from vraxion_ckpt.plugins.transform import Step
from vraxion_ckpt.reading.opening import (
    OptimizerPolicy,
    PathLike,
    check_allowed,
    detect_source,
    os_errors_named,
    read_with,
    refuse,
)
from vraxion_ckpt.reading.read_options import ReadKeywords, ReadOptions
from vraxion_ckpt.support import signals
from vraxion_ckpt.support.garbage import rare_collections


class Edited(Summary):
    """The result of an edit, or the expected result if `dry_run`; `bytes_written` is also computed for a dry run."""

    kind_of_facts: ClassVar[str] = "edit"

    kind: EditKind = EditKind.NOTHING
    written: tuple[str, ...] = ()
    """Written files, by path relative to the checkpoint; ``.`` is the checkpoint itself."""
    removed: tuple[str, ...] = ()
    """Removed files, by path relative to the checkpoint."""
    untouched: int = 0
    """Number of files of the checkpoint that do not change."""
    kept: Path | None = None
    """Path of the kept previous state."""


@memory_errors()
@rare_collections()
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
    neighbours: NeighbourPolicy = "refuse",
    **reading: Unpack[ReadKeywords],
) -> Edited:
    """Run a chain of transforms on a checkpoint in place. On an error, the checkpoint is left unchanged.

    Without a chain, only roll back or finish an interrupted edit.

    Args:
        path: a file or a directory.
        transforms: as for `convert`.
        to: the same format, with options for writing.
        losses: as for `convert`.
        keep_old: keep the previous state next to the checkpoint, with ``.old`` appended to its name.
        dry_run: do everything except writing.
        manifest: a file to write the digests of every file of the new state to. An existing manifest is replaced.
        result_order: as for `convert`.
        optimizer: as for `convert`.
        companions: as for `convert`.
        neighbours: as for `convert`.
        reading: as for `convert`.

    Returns:
        A summary of the edit.

    Raises:
        UsageError: an argument is wrong, or the path cannot be edited in place.
        BusyError: another run holds the lock of the checkpoint.
        CkptError: any error of `convert`.
    """
    started = time.monotonic()
    options, policy = ReadOptions.of("edit", reading), chain_policy(companions, neighbours, result_order)
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
            lent = LentTensors(before)
            _refuse_a_part(target, before)
            idle = not chain and optimizer in ("keep", "partial") and to is None and result_order is None
            idle = idle and not options.drop_keys
            if not idle:
                check_complete(before, optimizer)
            outcome = judge(apply(before, chain, lent, reopen, policy=policy), adapter, target, losses, overwrite=False)
            listed = _manifest_target(manifest, outcome, target, chain, keep_old=keep_old)
            _check_side_targets(target, chain, outcome, listed)
            refuse(InconsistentError, invariants.invariant_findings(before), target)  # with the experts opened since
            plan = plan_edit(adapter, target, outcome, marks, keep_old=keep_old, idle=idle)
            job = EditJob(adapter, options.allow_globals, target, outcome, lent, plan, listed, keep_old)
            staging = job.measure() if dry_run else job.stage(stack)
            facts = job.facts(staging, dropped=optimizer == "drop")  # the commit may replace the files that it reads
        kept = job.publish(staging)
        seconds = time.monotonic() - started
        return Edited(source=target, target=target, seconds=seconds, dry_run=dry_run, kept=kept, **facts)


def _existing(path: PathLike) -> Path:
    target = Path(os.path.realpath(path))
    if not target.exists():
        raise UsageError("no such file or directory", path=path)
    if not target.name:
        raise UsageError("cannot be edited in place", path=path)
    return target


def _check_side_targets(target: Path, chain: Sequence[Step], outcome: Outcome, listed: SideTarget | None) -> None:
    """Check where the side files and the manifest go."""
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
        _refuse_a_part(target, adapter_calls.call_read(found, target, options.allow_globals, options.drop_keys))
    adapter = resolve_adapter(to) if to is not None else adapter_calls.as_stored(found, target)
    if adapter.name != found.name:
        message = f"has the format {found.name}, which an edit in place cannot change"
        raise UsageError(message, path=target, hint=f"use convert to write {adapter.name} to a new path")
    lists_foreign = isinstance(adapter, IncrementalDirectoryAdapter)  # checked by each call
    if target.is_dir() and not lists_foreign and adapter_calls.foreign_files(adapter, target) is None:
        raise UsageError(
            f"the format {adapter.name} cannot distinguish its own files from foreign ones, which would be lost",
            path=target,
            hint="use convert to a new path",
        )
    is_directory = adapter_calls.is_directory(adapter)
    if is_directory != target.is_dir():
        kind = "directory" if is_directory else "file"
        raise UsageError(
            f"is not a {kind}, but with these options {adapter.name} writes a {kind}",
            path=target,
            hint=f"pass --to {adapter.name}:key=value; `vraxion-ckpt describe {adapter.name}` lists the options",
        )
    return adapter


def _manifest_target(
    manifest: PathLike | None, outcome: Outcome, target: Path, chain: Sequence[Step], *, keep_old: bool
) -> SideTarget | None:
    if manifest is None:
        return None
    place = check_manifest(Path(manifest), outcome.before, target, chain, outcome.side_files, overwrite=True)
    if keep_old and re.fullmatch(rf"{re.escape(str(target))}\.old[0-9]*", str(place.path)):
        raise UsageError("is reserved for the previous state", path=manifest, hint="choose another name")
    outcome.before.open_experts()  # a manifest lists only files that were read
    return place


def _refuse_a_part(target: Path, checkpoint: Checkpoint) -> None:
    root = Path(os.path.realpath(checkpoint.origin.path or target))
    if root != target:
        raise UsageError(f"is a part of the checkpoint {root}", path=target, hint="edit the whole checkpoint")
