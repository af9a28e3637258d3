"""Convert: the whole flow, top to bottom.

::

    path ──detect──▶ Adapter.read ──bind──▶ Checkpoint
                     Transform.apply, one after the other ──▶ Checkpoint
                     invariants, losses ──▶ go / stop, before a byte is written
                     Adapter.write ──▶ staged ──read back, compare──▶ flush, commit
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.comparison import differences_and_checksums, without_experts
from vraxion_ckpt.checkpoint.model import Checkpoint, Record
from vraxion_ckpt.commit.manifest import by_name, dumps, make
from vraxion_ckpt.commit.staging import Staged, exclusive, leftovers, staged
from vraxion_ckpt.commit.system_calls import write_new
from vraxion_ckpt.commit.transaction import committed
from vraxion_ckpt.conversion.summary import Outcome, Summary, count_tensors
from vraxion_ckpt.conversion.targets import (
    Beside,
    check_apart,
    check_inputs,
    check_manifest,
    check_places,
    check_several,
    detect_target,
    say_what_names_deny,
)
from vraxion_ckpt.conversion.verify_before_write import (
    LossPolicy,
    apply,
    chain_policy,
    check_complete,
    check_policy,
    judge,
)
from vraxion_ckpt.errors import (
    CkptError,
    CkptWarning,
    InconsistentError,
    InvariantError,
    StorageError,
    UsageError,
    memory_errors,
)
from vraxion_ckpt.experts.companion_updates import CompanionPolicy
from vraxion_ckpt.optimizer import binding
from vraxion_ckpt.optimizer.binding import OptimizerOrder
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.plugins.discovery import AdapterLike, TransformLike, resolve_chain
from vraxion_ckpt.plugins.lent_tensors import SourceTensors, wrote_into
from vraxion_ckpt.plugins.options import defect_of
from vraxion_ckpt.plugins.plugin_calls import output_to_stderr
from vraxion_ckpt.plugins.transform import Step
from vraxion_ckpt.reading.opening import OptimizerPolicy, PathLike, os_errors_named, read, refuse
from vraxion_ckpt.support import signals


@dataclass(frozen=True)
class Target:
    """One place that a result goes to; the options are those of `convert`."""

    path: PathLike
    to: AdapterLike | None = None
    losses: LossPolicy = "raise"
    overwrite: bool = False
    manifest: PathLike | None = None


def convert(
    src: PathLike,
    dst: PathLike,
    *,
    transforms: Sequence[TransformLike] = (),
    from_: AdapterLike | None = None,
    to: AdapterLike | None = None,
    losses: LossPolicy = "raise",
    overwrite: bool = False,
    dry_run: bool = False,
    manifest: PathLike | None = None,
    param_names: Sequence[str] | None = None,
    optimizer_order: OptimizerOrder | None = None,
    result_order: Sequence[str] | None = None,
    optimizer: OptimizerPolicy = "keep",
    companions: CompanionPolicy = "grow",
    allow_globals: Sequence[str] = (),
) -> Summary:
    """Read `src`, run a chain of transforms, write `dst`; or raise, and leave everything as it was.

    Args:
        src: a checkpoint of any format; never changed.
        dst: a new path, whose format is `to` or follows from its name.
        transforms: a chain, run from left to right: texts like ``"mitosis_split:noise=0"``, (name, options)
            pairs, or instances.
        losses: what to do about what `dst`'s format cannot hold.
        overwrite: replace an existing `dst`, in one step, once the result is complete.
        dry_run: do everything but write.
        manifest: a file for the digests of what was written, see `vraxion_ckpt.commit.manifest`.
        from_: as for `read`.
        to: the format of `dst`.
        param_names: as for `read`.
        optimizer_order: as for `read`.
        result_order: the names of the result's optimizer in its order, where no rule tells it.
        optimizer: as for `read`; ``partial`` carries an optimizer along that does not list all experts.
        companions: what becomes of averages of the model and the like if the chain changes the head: ``grow`` lets them
            follow or refuses, ``keep`` leaves them unchanged, ``drop`` leaves them out.
        allow_globals: as for `read`.

    Raises:
        CkptError: one subclass for each kind of reason, see `vraxion_ckpt.errors`.
    """
    (summary,) = convert_to_all(
        src,
        [Target(dst, to, losses, overwrite, manifest)],
        transforms=transforms,
        from_=from_,
        dry_run=dry_run,
        param_names=param_names,
        optimizer_order=optimizer_order,
        result_order=result_order,
        optimizer=optimizer,
        companions=companions,
        allow_globals=allow_globals,
    )
    return summary


@memory_errors()
def convert_to_all(
    src: PathLike,
    targets: Sequence[Target],
    *,
    transforms: Sequence[TransformLike] = (),
    from_: AdapterLike | None = None,
    dry_run: bool = False,
    param_names: Sequence[str] | None = None,
    optimizer_order: OptimizerOrder | None = None,
    result_order: Sequence[str] | None = None,
    optimizer: OptimizerPolicy = "keep",
    companions: CompanionPolicy = "grow",
    allow_globals: Sequence[str] = (),
    record: Record | None = None,
    reads: Sequence[Path] = (),
) -> tuple[Summary, ...]:
    """Do what `convert` does for several targets: read once, run the chain once, and judge and stage all of them.

    Only when all are complete and on the disk, they are put in place one after the other, each in one step.

    `record` is put into the history before those of the chain; `reads` are further files that must not be written over.
    The other arguments are those of `convert`.
    """
    started = time.monotonic()
    with signals.put_off(), os_errors_named(src, *_places_given(targets)), ExitStack() as stack:
        with signals.stoppable():
            chain = resolve_chain(transforms)
            source = Path(src)
            places = [_place(source, target) for target in targets]
            check_several([place for _, place in places])  # before the locks: the second of two would be busy
            if not dry_run:
                for _, place in places:
                    stack.enter_context(exclusive(place))

            policy = chain_policy(companions, result_order)
            reopen = partial(
                read,
                source,
                from_=from_,
                param_names=param_names,
                optimizer_order=optimizer_order,
                optimizer=optimizer,
                allow_globals=allow_globals,
            )
            before = reopen()
            lent = SourceTensors(before, reopen)
            check_complete(before, optimizer)
            for _, place in places:
                check_apart(place, before)
            with output_to_stderr():  # once, not for each of them
                before.open_experts()  # a new target holds them all, so all are judged now
            refuse(InconsistentError, invariants.findings(before), source)
            applied = apply(before, chain, lent, record, policy)
            results = [
                _Result(
                    target, adapter, place, judge(applied, adapter, place, target.losses, overwrite=target.overwrite)
                )
                for target, (adapter, place) in zip(targets, places, strict=True)
            ]
            manifests = [_manifest_place(result, chain) for result in results]
            besides = [*results[0].outcome.besides, *(manifest for manifest in manifests if manifest is not None)]
            written = [*(place for _, place in places), *(beside.path for beside in besides)]
            check_several(written)
            check_inputs(written, chain, applied.side_files, {Path(os.path.realpath(path)) for path in reads})
            say_what_names_deny(((place, adapter) for adapter, place in places), besides)

            nothing = Staging(sizes=[0] * len(results))
            staging = nothing if dry_run else _stage_all(stack, results, manifests, lent)
            before.sources.verify()  # what was not carried into the result, too
        _publish(staging, before)
        return tuple(
            Summary(
                source=source,
                target=result.place,
                target_format=result.adapter.name,
                tensors=count_tensors(before, result.outcome.held),
                manifest=manifest.path if manifest is not None else None,
                bytes_written=size,
                seconds=time.monotonic() - started,
                dry_run=dry_run,
                **result.outcome.facts(dropped=optimizer == "drop"),
            )
            for result, manifest, size in zip(results, manifests, staging.sizes, strict=True)
        )


def _places_given(targets: Sequence[Target]) -> list[PathLike]:
    manifests = [target.manifest for target in targets if target.manifest is not None]
    return [*(target.path for target in targets), *manifests]


@dataclass(frozen=True)
class _Result:
    """What is to be written to one target."""

    target: Target
    adapter: Adapter
    place: Path
    outcome: Outcome


def _place(source: Path, target: Target) -> tuple[Adapter, Path]:
    """Return the adapter and the final path of a target, before anything is read."""
    check_policy(target.losses)
    adapter, place = detect_target(target.path, target.to)
    try:
        check_places(source, place, adapter, overwrite=target.overwrite)
    except UsageError as error:
        if place.exists() and not target.overwrite and leftovers(place):
            error.hint = "a run that was to write it was interrupted; --overwrite replaces what it has finished"
        raise
    return adapter, place


def _manifest_place(result: _Result, chain: Sequence[Step]) -> Beside | None:
    if result.target.manifest is None:
        return None
    outcome = result.outcome
    return check_manifest(
        Path(result.target.manifest),
        outcome.before,
        result.place,
        chain,
        outcome.side_files,
        overwrite=result.target.overwrite,
    )


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
        with signals.stoppable():
            for stage in stages:
                stage.prepare()
        with signals.put_off():
            yield


def _stage_all(
    stack: ExitStack, results: Sequence[_Result], manifests: Sequence[Beside | None], lent: SourceTensors
) -> Staging:
    """Stage, read back and compare."""
    stages = [_stage(stack, result, lent) for result in results]
    outcome = results[0].outcome
    sides = stage_side_files(stack, outcome.side_files, outcome.besides)
    listed = [
        stage_manifest(stack, place, result.adapter, by_name(stage.path, files_below(stage.path)), result.place)
        for result, stage, place in zip(results, stages, manifests, strict=True)
    ]
    sizes = [sum(file.stat().st_size for file in files_below(stage.path)) for stage in stages]
    sizes[0] += sum(side.path.stat().st_size for side in sides)
    return Staging(list(zip(stages, listed, strict=True)), sides, sizes)


def _publish(staging: Staging, before: Checkpoint) -> None:
    """Put everything in its place, the targets last: if they are there, all is there."""
    pairs, check = staging.targets, before.sources.check_unchanged
    with staging.as_one():
        for side in staging.sides:
            side.publish(check=check)
        for number, (stage, manifest) in enumerate(pairs):
            try:
                publish(stage, manifest, check=check)
            except CkptError as error:
                if number:
                    there, lacking = _names(pairs[:number]), _names(pairs[number:])
                    error.message = error.message.removesuffix("; nothing was written")
                    written = f"{there} was written, " if not isinstance(error, StorageError) else ""
                    error.message += f"; {written}{lacking} was not"  # of a StorageError, each stage says it itself
                raise


def _names(pairs: Sequence[tuple[Staged, Staged | None]]) -> str:
    return ", ".join(str(stage.target) for stage, _ in pairs)


def _stage(stack: ExitStack, result: _Result, lent: SourceTensors) -> Staged:
    """Write a result beside its target, read it back and compare."""
    adapter, held = result.adapter, result.outcome.held
    is_directory = adapter_calls.is_directory(adapter)
    stage = stack.enter_context(staged(result.place, directory=is_directory, overwrite=result.target.overwrite))
    write_whole(adapter, result.outcome.before, held, stage)
    with quietly():
        found = adapter_calls.read(adapter, stage.path)
    check_read_back(adapter, found, held, lent, result.place)
    return stage


def files_below(path: Path) -> list[Path]:
    """List the files of a staged result."""
    return [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]


def stage_manifest(
    stack: ExitStack, place: Beside | None, adapter: Adapter, files: Mapping[str, Path], target: Path
) -> Staged | None:
    """Stage the manifest of files that were read back; what may be replaced was judged before."""
    if place is None:
        return None
    stack.enter_context(exclusive(place.path))
    stage = stack.enter_context(staged(place.path, directory=False, overwrite=place.replace))
    write_new(stage.path, dumps(make(target.name, adapter.name, files)))
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


def stage_side_files(stack: ExitStack, side_files: dict[Path, bytes], besides: Sequence[Beside]) -> list[Staged]:
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
    refuse(InvariantError, invariants.findings(found), target)
    found, expected = without_experts(found, untouched), without_experts(expected, untouched)
    listed = list(islice(differences_and_checksums(expected, found, lent.original), 20))
    if written := lent.written() or (lent.altered_in(expected) if listed else []):
        raise defect_of(adapter, wrote_into(written))
    refuse(InvariantError, iter(listed), target)
    found.sources.verify()
