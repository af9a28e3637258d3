"""Stage and publish an edit that was planned."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vraxion_ckpt.checkpoint.comparison import without_experts
from vraxion_ckpt.checkpoint.plain_data import size_of
from vraxion_ckpt.checkpoint.written_files import WrittenFiles, recording
from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.commit.file_marks import mark_of
from vraxion_ckpt.commit.manifest import by_name
from vraxion_ckpt.commit.staging import Staged, staged
from vraxion_ckpt.conversion.edit_plan import EditKind, EditPlan, refuse_unwritable
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
from vraxion_ckpt.conversion.summary import Outcome, TensorCount, count_tensors
from vraxion_ckpt.conversion.targets import SideTarget
from vraxion_ckpt.errors import UsageError
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter, IncrementalDirectoryAdapter
from vraxion_ckpt.plugins.lent_tensors import LentTensors
from vraxion_ckpt.reading.opening import files_of


@dataclass(frozen=True)
class EditJob:
    """An edit that was checked and planned, and can be staged and published.

    Attributes:
        lent: the tensors of the source, to compare the result with.
        listed: where the manifest goes, if one is to be written.
        keep_old: whether the previous state is kept.
    """

    adapter: Adapter
    allow_globals: Sequence[str]
    target: Path
    outcome: Outcome
    lent: LentTensors
    plan: EditPlan
    listed: SideTarget | None
    keep_old: bool

    def measure(self) -> Staging:
        """Return how many bytes a dry run would write. If the format cannot tell, count the bytes of the tensors."""
        if self.plan.kind is EditKind.NOTHING:
            return Staging(sizes=[0])
        self.outcome.before.sources.verify()
        held, plan = self.outcome.held, self.plan
        if isinstance(self.adapter, IncrementalDirectoryAdapter):
            files = (plan.files[name] for name in plan.written)
            size: int | None = sum(adapter_calls.file_size(self.adapter, file) for file in files)
        else:
            size = adapter_calls.size(self.adapter, held)
        if size is None:
            size = size_of([held.state_references(), held.payload, held.optimizer.state if held.optimizer else {}])
        return Staging(sizes=[size + plan.copied + sum(map(len, self.outcome.side_files.values()))])

    def stage(self, stack: ExitStack) -> Staging:
        """Stage the files that change, read the new state back and compare it."""
        refuse_unwritable(self.target, self.plan)
        if self.plan.kind is EditKind.NOTHING:
            return Staging(sizes=[0]) if self.listed is None else self._stage_manifest_alone(stack, self.listed)
        before, held, plan, target = self.outcome.before, self.outcome.held, self.plan, self.target
        stage = stack.enter_context(staged(target, directory=target.is_dir(), overwrite=True, change=plan.change))
        if isinstance(self.adapter, IncrementalDirectoryAdapter):
            with recording() as written:
                for name in plan.written:
                    (stage.path / name).parent.mkdir(parents=True, exist_ok=True)
                    adapter_calls.write_file(self.adapter, plan.files[name], stage.path / name)
        else:
            written = write_whole(self.adapter, before, held, stage)
        sides = stage_side_files(stack, self.outcome.side_files, self.outcome.side_targets)
        new = by_name(stage.path, files_below(stage.path))
        staged_files = [*new.values(), *(side.path for side in sides)]
        size = plan.copied + sum(path.stat().st_size for path in staged_files)
        for name in plan.carried:
            _carry(target / name, stage.path / name, copy=self.keep_old)
        self._read_back(stage, written)
        files = {name: new.get(name, target / name) for name in plan.files} if self.listed is not None else {}
        manifest = stage_manifest(stack, self.listed, self.adapter, files or new, target)
        before.sources.verify()  # including parts that are not in the result
        before.sources.check_unchanged()
        return Staging([(stage, manifest)], sides, [size])

    def _stage_manifest_alone(self, stack: ExitStack, place: SideTarget) -> Staging:
        """Stage the manifest of a checkpoint that does not change."""
        before = self.outcome.before
        files = files_of(self.adapter, self.target, before.origin.leftovers)
        manifest = stage_manifest(stack, place, self.adapter, by_name(self.target, files), self.target)
        assert manifest is not None
        before.sources.verify()
        before.sources.check_unchanged()
        return Staging([], [manifest], [manifest.path.stat().st_size])

    def _read_back(self, stage: Staged, written: WrittenFiles) -> None:
        """Read the new state as a reader would, and compare its changed parts with their source."""
        allowed = (*self.allow_globals, *adapter_calls.OWN_GLOBALS)
        with quietly():
            if self.plan.change.exchanged != "." and isinstance(self.adapter, IncrementalDirectoryAdapter):
                removed = self.plan.removed
                found = adapter_calls.read_overlay(self.adapter, self.target, stage.path, removed, allowed)
            else:
                found = adapter_calls.call_read(self.adapter, stage.path, allowed)
                found.open_experts()  # including unchanged ones
        check_read_back(
            self.adapter, found, self.outcome.held, self.lent, written, self.target, untouched=self._untouched()
        )

    def publish(self, staging: Staging) -> Path | None:
        """Commit the side files, then the target, then its manifest. Return the path of the kept previous state."""
        kept, plan = None, self.plan
        with staging.as_one():
            for side in staging.sides:
                side.publish()
            for stage, manifest in staging.targets:
                watched = dict(plan.watched)
                for name in plan.watched.keys() - plan.files.keys() if plan.carried else ():
                    linked = mark_of(stage.path / name)
                    if linked and linked[0] == watched[name][0]:  # a foreign file: a later write reaches both names
                        watched[name] = linked[:1]
                kept = publish(stage, manifest, watched=watched, keep_old=self.keep_old)
        return kept

    def facts(self, staging: Staging, *, dropped: bool) -> dict[str, Any]:
        """Return the facts of a `Summary` that follow from the plan and the staged files.

        Args:
            staging: the staged or measured files.
            dropped: whether the caller asked to drop the optimizer.
        """
        return {
            **self.outcome.facts(dropped=dropped),
            "target_format": self.adapter.name,
            "tensors": self._count_tensors(),
            "manifest": self.listed.path if self.listed is not None else None,
            "bytes_written": staging.sizes[0],
            "kind": self.plan.kind,
            "written": self.plan.written,
            "removed": self.plan.removed,
            "untouched": self.plan.untouched,
        }

    def _count_tensors(self) -> TensorCount:
        if self.plan.kind is EditKind.NOTHING:
            return TensorCount()
        same = self._untouched()
        return count_tensors(without_experts(self.outcome.before, same), without_experts(self.outcome.held, same))

    def _untouched(self) -> set[int]:
        """Return the ids of experts that are the same object before and after, so that their files do not change."""
        before, held = self.outcome.before.head, self.outcome.held.head
        if not self.plan.files or before is None or held is None:
            return set()
        return {i for i, expert in held.experts.items() if before.experts.get(i) is expert}


def _carry(source: Path, target: Path, *, copy: bool) -> None:
    """Link a file, or all files of a folder, into the new state.

    If the previous state is kept, copy instead, so that a later write does not reach both states.
    """
    if source.is_dir() and not source.is_symlink():
        target.mkdir(parents=True, exist_ok=True)
        for entry in source.iterdir():
            _carry(entry, target / entry.name, copy=copy)
    elif os.path.lexists(target):
        message = "is not part of the checkpoint, but has the name of a file of its new state"
        raise UsageError(message, path=source, hint="move it away, or use convert to a new path")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        (system_calls.copy if copy else system_calls.link_or_copy)(source, target)
