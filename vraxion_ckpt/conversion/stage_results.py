"""Stage the files of a conversion, read them back, compare and publish them. Shared by `convert` and `edit`."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.comparison import without_experts
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.written_files import WrittenFiles, recording
from vraxion_ckpt.commit.manifest import dump_manifest, make_manifest
from vraxion_ckpt.commit.staging import Staged, exclusive, staged
from vraxion_ckpt.commit.system_calls import write_new
from vraxion_ckpt.commit.transaction import committed
from vraxion_ckpt.conversion.read_back import read_back_differences
from vraxion_ckpt.conversion.targets import SideTarget
from vraxion_ckpt.errors import CkptWarning, InvariantError, StorageError
from vraxion_ckpt.optimizer import binding
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.plugins.lent_tensors import LentTensors, counted_writes, wrote_into
from vraxion_ckpt.plugins.options import defect_of
from vraxion_ckpt.reading.opening import refuse
from vraxion_ckpt.support import signals


@dataclass(frozen=True)
class Staging:
    """The staged files of a run.

    Attributes:
        targets: each staged target, with its staged manifest if it has one.
        sides: the staged side files.
        sizes: bytes written for each target; the first includes the side files.
    """

    targets: Sequence[tuple[Staged, Staged | None]] = ()
    sides: Sequence[Staged] = ()
    sizes: Sequence[int] = ()

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Defer signals in a ``with`` block that publishes the files."""
        stages = [*self.sides, *(stage for pair in self.targets for stage in pair if stage is not None)]
        if len(stages) == 1:  # its commit is one step at the end
            yield
            return
        with signals.interruptible():
            for stage in stages:
                stage.prepare()
        with signals.deferred():
            yield


def files_below(path: Path) -> list[Path]:
    """List the files of a staged result."""
    return [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]


def stage_manifest(
    stack: ExitStack, place: SideTarget | None, adapter: Adapter, files: Mapping[str, Path], target: Path
) -> Staged | None:
    """Stage the manifest of `files`, by relative path. Return None if no manifest is wanted."""
    if place is None:
        return None
    stack.enter_context(exclusive(place.path))
    stage = stack.enter_context(staged(place.path, directory=False, overwrite=place.replace))
    write_new(stage.path, dump_manifest(make_manifest(target.name, adapter.name, files)))
    return stage


def publish(stage: Staged, manifest: Staged | None, **how: Any) -> Path | None:
    """Publish a result, as `Staged.publish` does, and then its manifest.

    In this order, an old manifest stays correct if the result cannot be published. If the run is killed in between, the
    manifest is missing or outdated, and `check` reports it.
    """
    try:
        return stage.publish(**how)
    finally:
        if manifest is not None and stage.target in committed:  # even if a step after the commit failed
            manifest.publish()


def write_whole(adapter: Adapter, before: Checkpoint, held: Checkpoint, stage: Staged) -> WrittenFiles:
    """Let an adapter write to a stage. Return the checksums that the writers have read back.

    Raises:
        ChangedError: a source file changed while it was being read.
        StorageError: the operating system cannot write.
    """
    try:
        with recording() as written:
            adapter_calls.write(adapter, held, stage.path)
    except StorageError:
        before.sources.check_unchanged()  # reading a truncated source fails with an I/O error, too
        raise
    return written


def stage_side_files(
    stack: ExitStack, side_files: dict[Path, bytes], side_targets: Sequence[SideTarget]
) -> list[Staged]:
    """Stage the side files. `side_targets` has the target of each."""
    stages = []
    for content, side in zip(side_files.values(), side_targets, strict=True):
        stack.enter_context(exclusive(side.path))
        stages.append(stack.enter_context(staged(side.path, directory=False, overwrite=side.replace)))
        write_new(stages[-1].path, content)
    return stages


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress warnings while reading back: reading the source gave the same warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CkptWarning)
        yield


def check_read_back(
    adapter: Adapter,
    found: Checkpoint,
    expected: Checkpoint,
    lent: LentTensors,
    written: WrittenFiles,
    target: Path,
    *,
    untouched: Collection[int] = frozenset(),
) -> None:
    """Compare a result that was read back with the files of the source and the tensors that the chain created.

    Args:
        adapter: wrote the result.
        found: the result that was read back.
        expected: the checkpoint that was written.
        lent: the tensors of the source.
        written: the checksums that the writers have read back.
        target: the final path, for error messages.
        untouched: ids of experts that were not written.

    Raises:
        InvariantError: the result differs or violates an invariant.
        PluginError: the adapter wrote into a tensor of its input.
        CorruptError: a checksum of the result is wrong.
    """
    if found.param_names not in (None, expected.param_names):
        raise InvariantError("param_names changed when the result was read back", path=target)
    refuse(InvariantError, invariants.invariant_findings(found), target)
    found = binding.bind(found)  # which checks the optimizer's names and shapes, as the invariants do for a bound one
    found, expected = without_experts(found, untouched), without_experts(expected, untouched)
    listed = list(islice(read_back_differences(expected, found, written), 20))
    if touched := counted_writes(expected) or lent.altered():
        raise defect_of(adapter, wrote_into(touched))
    refuse(InvariantError, iter(listed), target)
    found.sources.verify()
