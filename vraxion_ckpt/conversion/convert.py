"""Convert a checkpoint: read, run a chain of transforms, check, write.

::

    path ──detect──▶ Adapter.read ──bind──▶ Checkpoint
                     Transform.apply, one after the other ──▶ Checkpoint
                     invariants, losses ──▶ go or stop, before anything is written
                     Adapter.write ──▶ staged ──read back, compare──▶ flush, commit
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack

from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.provenance import Record
from vraxion_ckpt.commit.manifest import by_name
from vraxion_ckpt.commit.staging import Staged, exclusive, leftovers, staged
from vraxion_ckpt.commit.transaction import committed
from vraxion_ckpt.conversion.carry_neighbours import copy_neighbours, say_what_is_not_read
from vraxion_ckpt.conversion.chain import ChainPolicy, NeighbourPolicy
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
from vraxion_ckpt.conversion.summary import Outcome, Summary, count_tensors
from vraxion_ckpt.conversion.targets import (
    SideTarget,
    check_apart,
    check_inputs,
    check_manifest,
    check_nothing_deleted,
    check_places,
    check_several,
    detect_target,
    say_what_names_deny,
)
from vraxion_ckpt.conversion.verify_before_write import (
    Applied,
    LossPolicy,
    apply,
    chain_policy,
    check_complete,
    check_policy,
    judge,
)
from vraxion_ckpt.errors import CkptError, InconsistentError, UsageError, memory_errors
from vraxion_ckpt.experts.companion_updates import CompanionPolicy
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.plugins.discovery import AdapterLike, TransformLike, resolve_chain
from vraxion_ckpt.plugins.lent_tensors import LentTensors
from vraxion_ckpt.plugins.plugin_calls import output_to_stderr
from vraxion_ckpt.plugins.transform import Step
from vraxion_ckpt.reading.opening import OptimizerPolicy, PathLike, detect_source, os_errors_named, read_with, refuse
from vraxion_ckpt.reading.read_options import ReadKeywords, ReadOptions
from vraxion_ckpt.support import signals
from vraxion_ckpt.support.garbage import rare_collections


@dataclass(frozen=True)
class Target:
    """A target and its options, which are those of `convert`."""

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
    to: AdapterLike | None = None,
    losses: LossPolicy = "raise",
    overwrite: bool = False,
    dry_run: bool = False,
    manifest: PathLike | None = None,
    result_order: Sequence[str] | None = None,
    optimizer: OptimizerPolicy = "keep",
    companions: CompanionPolicy = "grow",
    neighbours: NeighbourPolicy = "refuse",
    **reading: Unpack[ReadKeywords],
) -> Summary:
    """Read `src`, run a chain of transforms and write `dst`. On an error, nothing is changed.

    Args:
        src: a checkpoint of any format. It is never changed.
        dst: a new path.
        transforms: the chain, run from left to right: strings such as ``"mitosis_split:noise=0"``, (name, options)
            pairs, or instances.
        to: the format of `dst`; chosen by the name of `dst` if None.
        losses: how to handle parts of the checkpoint that the format cannot hold.
        overwrite: replace an existing `dst`, in one step, when the result is complete.
        dry_run: do everything except writing.
        manifest: a file to write the digests of the written files to, see `vraxion_ckpt.commit.manifest`.
        result_order: the names of all optimizer parameters of the result, in optimizer order, if no rule determines
            the order.
        optimizer: as for `vraxion_ckpt.open`. ``keep`` refuses an optimizer that has a parameter for some experts but
            not for others; ``partial`` accepts it.
        companions: how to handle companions, such as averages of the model, if the chain changes the head. ``grow``
            changes them like the head, or refuses; ``keep`` leaves them unchanged; ``drop`` omits them.
        neighbours: how to handle files beside the weights, such as a Trainer's optimizer, that do not fit the model
            any more if the chain changes it. ``refuse`` refuses the chain; ``ignore`` leaves them out. Other files are
            copied in any case, if `dst` is a folder with a place for them.
        reading: ``from_``, ``param_names``, ``optimizer_order``, ``allow_globals``, ``drop_keys``: see `ReadOptions`.

    Returns:
        A summary of the conversion.

    Raises:
        UsageError: an argument is wrong, or a path cannot be written.
        SourceError: the source is damaged, unsafe, inconsistent or not supported.
        BindingError: the optimizer cannot be bound to parameter names, or is incomplete.
        TransformError: a transform refuses the checkpoint.
        InvariantError: the result violates an invariant, or differs when it is read back.
        LossError: the format cannot hold everything, and `losses` is ``raise``.
        ChangedError: a source file changed during the run.
        StorageError: the operating system cannot read or write.
        PluginError: a plugin failed.
        BusyError: another run holds the lock of the target.
    """
    (summary,) = convert_to_all(
        src,
        [Target(dst, to, losses, overwrite, manifest)],
        transforms=transforms,
        options=ReadOptions.of("convert", reading),
        optimizer=optimizer,
        policy=chain_policy(companions, neighbours, result_order),
        dry_run=dry_run,
    )
    return summary


@memory_errors()
@rare_collections()
def convert_to_all(
    src: PathLike,
    targets: Sequence[Target],
    *,
    transforms: Sequence[TransformLike],
    options: ReadOptions,
    optimizer: OptimizerPolicy,
    policy: ChainPolicy,
    dry_run: bool,
    record: Record | None = None,
    reads: Sequence[Path] = (),
) -> tuple[Summary, ...]:
    """Convert one source to several targets: read once, run the chain once, then check and stage all targets.

    The targets are committed one after the other, each in one step, when all of them are complete and flushed to disk.

    Args:
        src: as for `convert`.
        targets: the targets.
        transforms: as for `convert`.
        options: how to read `src`.
        optimizer: as for `convert`.
        policy: how companions, neighbours and the optimizer follow a change of the model.
        dry_run: do everything except writing.
        record: inserted into the history before the records of the chain.
        reads: further input files, which must not be overwritten.

    Returns:
        A summary for each target.

    Raises:
        CkptError: any error of `convert`. Its `written` and `not_written` list the targets if some were committed.
    """
    started = time.monotonic()
    with signals.deferred(), os_errors_named(src, *_paths_of(targets)), ExitStack() as stack:
        with signals.interruptible():
            chain = resolve_chain(transforms)
            source = Path(src)
            places = [_place(source, target) for target in targets]
            check_several([place for _, place in places])  # before the locks: the second of two would be busy
            if not dry_run:
                for _, place in places:
                    stack.enter_context(exclusive(place))

            reopen = partial(read_with, source, options, optimizer)
            before = reopen()
            lent = LentTensors(before)
            check_complete(before, optimizer)
            _check_source(before, source, [place for _, place in places])
            applied = apply(before, chain, lent, reopen, record, policy)
            results = [_result(applied, target, *place) for target, place in zip(targets, places, strict=True)]
            manifests = [_manifest_target(result, chain) for result in results]
            _check_paths(results, manifests, chain, reads)
            for result in results:
                _check_neighbours(result, options)
            staging = Staging(sizes=[0] * len(results)) if dry_run else _stage_all(stack, results, manifests, lent)
            before.sources.verify()  # including parts that are not in the result
            # Collected before the commit, so that an error in it leaves everything unchanged.
            summaries = [
                Summary(
                    source=source,
                    target=result.place,
                    target_format=result.adapter.name,
                    tensors=count_tensors(before, result.outcome.held),
                    manifest=manifest.path if manifest is not None else None,
                    bytes_written=size,
                    seconds=0.0,
                    dry_run=dry_run,
                    **result.outcome.facts(dropped=optimizer == "drop"),
                )
                for result, manifest, size in zip(results, manifests, staging.sizes, strict=True)
            ]
        _publish(staging, before)
        seconds = time.monotonic() - started
        return tuple(summary.model_copy(update={"seconds": seconds}) for summary in summaries)


def _paths_of(targets: Sequence[Target]) -> list[PathLike]:
    manifests = [target.manifest for target in targets if target.manifest is not None]
    return [*(target.path for target in targets), *manifests]


@dataclass(frozen=True)
class _Result:
    """A checked result that can be written to one target."""

    target: Target
    adapter: Adapter
    place: Path
    outcome: Outcome


def _result(applied: Applied, target: Target, adapter: Adapter, place: Path) -> _Result:
    outcome = judge(applied, adapter, place, target.losses, overwrite=target.overwrite)
    return _Result(target, adapter, place, outcome)


def _check_source(before: Checkpoint, source: Path, places: Sequence[Path]) -> None:
    """Check that the targets are apart from the source, and its invariants with all experts open."""
    for place in places:
        check_apart(place, before)
    with output_to_stderr():  # redirect once, not for each expert
        before.open_experts()
    refuse(InconsistentError, invariants.invariant_findings(before), source)


def _check_paths(
    results: Sequence[_Result], manifests: Sequence[SideTarget | None], chain: Sequence[Step], reads: Sequence[Path]
) -> None:
    """Check the paths of all outputs against each other and against the inputs."""
    outcome = results[0].outcome
    side_targets = [*outcome.side_targets, *(manifest for manifest in manifests if manifest is not None)]
    written = [*(result.place for result in results), *(side.path for side in side_targets)]
    check_several(written)
    check_inputs(written, chain, outcome.side_files, {Path(os.path.realpath(path)) for path in reads})
    say_what_names_deny(((result.place, result.adapter) for result in results), side_targets)


def _check_neighbours(result: _Result, options: ReadOptions) -> None:
    """Check that no neighbour of an existing target would be deleted, and say what the target does not hold."""
    adapter, place, outcome = result.adapter, result.place, result.outcome
    if not adapter_calls.keeps_neighbours(adapter):
        return
    carried = {neighbour.name for neighbour in outcome.neighbours.carried}
    old = adapter_calls.neighbours(adapter, place) if place.is_dir() else []
    check_nothing_deleted(place, adapter, [each.name for each in old if each.name not in carried])
    source = detect_source(result.outcome.before.origin.path or place, options.from_)
    say_what_is_not_read(outcome.before, outcome.neighbours.carried, source, place)


def _place(source: Path, target: Target) -> tuple[Adapter, Path]:
    """Return the adapter and the final path of a target, and check both before anything is read."""
    check_policy(target.losses)
    adapter, place = detect_target(target.path, target.to)
    try:
        check_places(source, place, adapter, overwrite=target.overwrite)
    except UsageError as error:
        if place.exists() and not target.overwrite and leftovers(place):
            hint = "an earlier run to this target was interrupted; --overwrite replaces the target"
            raise error.with_facts(hint=hint) from error.__cause__
        raise
    return adapter, place


def _manifest_target(result: _Result, chain: Sequence[Step]) -> SideTarget | None:
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


def _stage_all(
    stack: ExitStack, results: Sequence[_Result], manifests: Sequence[SideTarget | None], lent: LentTensors
) -> Staging:
    """Stage all results, read them back and compare them. Stage the side files and manifests."""
    stages = [_stage(stack, result, lent) for result in results]
    outcome = results[0].outcome
    sides = stage_side_files(stack, outcome.side_files, outcome.side_targets)
    listed = [
        stage_manifest(stack, place, result.adapter, by_name(stage.path, files_below(stage.path)), result.place)
        for result, stage, place in zip(results, stages, manifests, strict=True)
    ]
    sizes = [sum(file.stat().st_size for file in files_below(stage.path)) for stage in stages]
    sizes[0] += sum(side.path.stat().st_size for side in sides)
    return Staging(list(zip(stages, listed, strict=True)), sides, sizes)


def _publish(staging: Staging, before: Checkpoint) -> None:
    """Commit the side files, then the targets, so that a complete target implies complete side files."""
    pairs, check = staging.targets, before.sources.check_unchanged
    with staging.as_one():
        for side in staging.sides:
            side.publish(check=check)
        for number, (stage, manifest) in enumerate(pairs):
            try:
                publish(stage, manifest, check=check)
            except CkptError as error:
                if not number:
                    raise
                written = [done.target for done, _ in pairs[:number]]
                lacking = [other.target for other, _ in pairs[number:] if other.target not in committed]
                raise error.with_facts(written=written, not_written=lacking) from error.__cause__


def _stage(stack: ExitStack, result: _Result, lent: LentTensors) -> Staged:
    """Write a result to a staging path, read it back and compare it."""
    adapter, held = result.adapter, result.outcome.held
    is_directory = adapter_calls.is_directory(adapter)
    stage = stack.enter_context(staged(result.place, directory=is_directory, overwrite=result.target.overwrite))
    written = write_whole(adapter, result.outcome.before, held, stage)
    copy_neighbours(result.outcome.before, result.outcome.neighbours.carried, stage.path)
    with quietly():
        found = adapter_calls.call_read(adapter, stage.path, adapter_calls.OWN_GLOBALS)
    check_read_back(adapter, found, held, lent, written, result.place)
    return stage
