"""Stage the files of a conversion, read them back, compare, and publish: what `convert` and `edit` share."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.comparison import differences_and_checksums, without_experts
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.commit.manifest import dump_manifest, make_manifest
from vraxion_ckpt.commit.staging import Staged, exclusive, staged
from vraxion_ckpt.commit.system_calls import write_new
from vraxion_ckpt.commit.transaction import committed
from vraxion_ckpt.conversion.targets import SideTarget
from vraxion_ckpt.errors import CkptWarning, InvariantError, StorageError
from vraxion_ckpt.optimizer import binding
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.plugins.lent_tensors import SourceTensors, wrote_into
from vraxion_ckpt.plugins.options import defect_of
from vraxion_ckpt.reading.opening import refuse
from vraxion_ckpt.support import signals


@dataclass(frozen=True)
class Staging:
    """What is staged.

    Attributes:
        targets: each with its manifest, if it gets one.
        sides: the files beside them.
        sizes: the bytes that are written to each target; to the first, with those of the files beside it.
    """

    targets: Sequence[tuple[Staged, Staged | None]] = ()
    sides: Sequence[Staged] = ()
    sizes: Sequence[int] = ()

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Publish it in a ``with`` block, in which no signal comes between one thing and another."""
        stages = [*self.sides, *(stage for pair in self.targets for stage in pair if stage is not None)]
        if len(stages) == 1:  # its commit is one step, and comes after all that takes long
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
    """Stage the manifest of files that were read back; what may be replaced was judged before."""
    if place is None:
        return None
    stack.enter_context(exclusive(place.path))
    stage = stack.enter_context(staged(place.path, directory=False, overwrite=place.replace))
    write_new(stage.path, dump_manifest(make_manifest(target.name, adapter.name, files)))
    return stage


def publish(stage: Staged, manifest: Staged | None, **how: Any) -> Path | None:
    """Put a result in its place, as `Staged.publish` does, and then its manifest.

    In this order, a result that cannot be put in its place leaves an old manifest that still tells the truth. Killed
    between the two, a run leaves one that is missing, or that `check` finds to contradict the files.
    """
    try:
        return stage.publish(**how)
    finally:
        if manifest is not None and stage.target in committed:  # even if what had to be done afterwards has failed
            manifest.publish()


def write_whole(adapter: Adapter, before: Checkpoint, held: Checkpoint, stage: Staged) -> None:
    """Let an adapter write to a stage; a source that is cut short meanwhile is told from a full disk."""
    try:
        adapter_calls.write(adapter, held, stage.path)
    except StorageError:
        before.sources.check_unchanged()  # a source that is cut short fails wherever it is read
        raise


def stage_side_files(stack: ExitStack, side_files: dict[Path, bytes], besides: Sequence[SideTarget]) -> list[Staged]:
    """Stage the files that are to be written beside a target; what may be replaced was judged before."""
    stages = []
    for content, beside in zip(side_files.values(), besides, strict=True):
        stack.enter_context(exclusive(beside.path))
        stages.append(stack.enter_context(staged(beside.path, directory=False, overwrite=beside.replace)))
        write_new(stages[-1].path, content)
    return stages


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out the warnings of reading back: what is odd about a checkpoint was said when its source was read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CkptWarning)
        yield


def check_read_back(
    adapter: Adapter,
    found: Checkpoint,
    expected: Checkpoint,
    lent: SourceTensors,
    target: Path,
    *,
    untouched: Collection[int] = frozenset(),
) -> None:
    """Compare what was read back, as anyone would read it, with what it was made from; `untouched` experts were not.

    That is the source's files and what the chain has made, not what is in memory now: the adapter has had that since.
    """
    if found.param_names not in (None, expected.param_names):
        raise InvariantError("param_names came back changed", path=target)
    found = binding.bind(found)
    refuse(InvariantError, invariants.invariant_findings(found), target)
    found, expected = without_experts(found, untouched), without_experts(expected, untouched)
    listed = list(islice(differences_and_checksums(expected, found, lent.original), 20))
    if written := lent.written() or (lent.altered_in(expected) if listed else []):
        raise defect_of(adapter, wrote_into(written))
    refuse(InvariantError, iter(listed), target)
    found.sources.verify()
