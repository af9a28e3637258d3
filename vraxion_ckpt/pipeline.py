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
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from vraxion_ckpt import binding, invariants
from vraxion_ckpt.adapter import Adapter, Loss
from vraxion_ckpt.commit import Staged, exclusive, staged
from vraxion_ckpt.compare import differences_and_checksums, without_experts
from vraxion_ckpt.disk import write_new
from vraxion_ckpt.errors import (
    CkptWarning,
    InconsistentError,
    InvariantError,
    LossError,
    StorageError,
    TransformError,
    UsageError,
)
from vraxion_ckpt.invariants import Preservation
from vraxion_ckpt.model import Checkpoint, HeadKind
from vraxion_ckpt.plugins import AdapterLike, TransformLike, resolve_chain
from vraxion_ckpt.reading import OptimizerPolicy, PathLike, blamed, os_errors_named, read, refuse
from vraxion_ckpt.summary import Outcome, Summary, count_tensors
from vraxion_ckpt.targets import check_apart, check_places, check_side_files, detect_target
from vraxion_ckpt.transform import Step, apply_chain, moved_addresses

LossPolicy = Literal["raise", "warn", "ignore"]


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
    param_names: Sequence[str] | None = None,
    optimizer: OptimizerPolicy = "keep",
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
        from_: as for `read`.
        to: the format of `dst`.
        param_names: as for `read`.
        optimizer: as for `read`.
        allow_globals: as for `read`.

    Raises:
        CkptError: one subclass for each kind of reason, see `vraxion_ckpt.errors`.
    """
    started = time.monotonic()
    with os_errors_named(src, dst), ExitStack() as stack:
        check_policy(losses)
        chain = resolve_chain(transforms)
        adapter, target = detect_target(dst, to)
        source = Path(src)
        check_places(source, target, adapter, overwrite=overwrite)
        if not dry_run:
            stack.enter_context(exclusive(target))

        before = read(source, from_=from_, param_names=param_names, optimizer=optimizer, allow_globals=allow_globals)
        check_apart(target, before)
        before.open_experts()  # a new target holds them all, so all are judged now
        refuse(InconsistentError, invariants.findings(before), source)
        outcome = run_chain(before, chain, adapter, target, losses, overwrite=overwrite)
        tensors = count_tensors(before, outcome.held)

        bytes_written = 0
        if dry_run:
            before.sources.verify()
        else:
            bytes_written = _write(adapter, outcome, target, overwrite=overwrite)
        return Summary(
            source=source,
            target=target,
            target_format=adapter.name,
            tensors=tensors,
            bytes_written=bytes_written,
            seconds=time.monotonic() - started,
            dry_run=dry_run,
            **outcome.facts(dropped=optimizer == "drop"),
        )


def check_policy(losses: LossPolicy) -> None:
    """Refuse a policy that there is not."""
    if losses not in ("raise", "warn", "ignore"):
        raise UsageError(f"losses={losses!r}: none of raise, warn, ignore")


def run_chain(
    before: Checkpoint, chain: Sequence[Step], adapter: Adapter, target: Path, losses: LossPolicy, *, overwrite: bool
) -> Outcome:
    """Apply a chain and judge what comes of it: all that can be refused before a byte is written."""
    after, side_files = apply_chain(before, chain)
    check_side_files(side_files, before, target, chain, overwrite=overwrite)
    preservation = _check_result(before, after, chain)
    lost = _check_losses(adapter, after, losses)
    with blamed(adapter):
        held = adapter.held(after)
    return Outcome(before, after, held, side_files, preservation, tuple(lost))


def _check_result(before: Checkpoint, after: Checkpoint, chain: Sequence[Step]) -> Preservation | None:
    """Hold the chain to what must be true after it."""
    refuse(InvariantError, invariants.findings(after), after.origin.path)
    refuse(InvariantError, invariants.sharing_findings(before, after), after.origin.path)
    if not any(invariants.missing_siblings(before)):
        refuse(InvariantError, invariants.missing_siblings(after), after.origin.path)
    noises = [step.transform.function_noise() for step in chain]
    known = [noise for noise in noises if noise is not None]
    preservation = invariants.preservation(before, after, sum(known) if len(known) == len(noises) else None)
    if preservation and not preservation.as_asked:
        raise InvariantError(f"the function was to be preserved: {preservation}", path=after.origin.path)
    if chain:
        _check_leftovers(before, after)
    return preservation


def _check_leftovers(before: Checkpoint, after: Checkpoint) -> None:
    """Say what a chain has left as it was although it belongs to what it changed; refuse to leave an optimizer so."""
    if after.head and after.head.kind is HeadKind.EXPERTS and after.num_experts == 1:
        message = (
            "one expert under head.experts.* is loaded by no runtime; let mitosis_split or experts_to_single follow"
        )
        warnings.warn(message, CkptWarning, stacklevel=4)
    if not _head_was_rebuilt(before, after):
        return
    assert before.head is not None
    prefixes = (before.head.names.single, before.head.names.experts)
    for key, value in _dicts_in(after.payload):
        if {"state", "param_groups"} <= value.keys():
            raise TransformError(
                "is an optimizer's state, which cannot follow where it stands", key=key, hint="save it under `optim`"
            )
        if any(str(name).startswith(prefixes) for name in value):
            message = f"the payload's {key!r} also names tensors of the head; it is carried along unchanged"
            warnings.warn(message, CkptWarning, stacklevel=4)


def _head_was_rebuilt(before: Checkpoint, after: Checkpoint) -> bool:
    """Tell whether parameters of the head have come, gone or been renamed, even if there are as many as before."""
    if before.head is None or after.head is None:
        return False
    if before.head.kind != after.head.kind or before.num_experts != after.num_experts:
        return True
    return before.head.experts != after.head.experts and moved_addresses(before, after) > 0


def _dicts_in(value: Any, key: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield every dict inside a plain value with the path that leads there."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for name, entry in entries:
        place = f"{key}.{name}" if key else str(name)
        if isinstance(entry, dict):
            yield place, entry
        if isinstance(entry, dict | list | tuple):
            yield from _dicts_in(entry, place)


def _check_losses(adapter: Adapter, checkpoint: Checkpoint, policy: LossPolicy) -> list[Loss]:
    """Ask the format what it cannot hold, and do about it what the policy says."""
    with blamed(adapter):
        lost = adapter.losses(checkpoint)
    if lost and policy == "raise":
        listed = "; ".join(map(str, lost))
        raise LossError(f"{adapter.name} cannot hold {listed}", hint="pass --losses warn to write it without")
    if policy == "warn":
        for loss in lost:
            warnings.warn(f"{adapter.name} cannot hold {loss}", CkptWarning, stacklevel=3)
    return lost


def _write(adapter: Adapter, outcome: Outcome, target: Path, *, overwrite: bool) -> int:
    """Stage, read back, compare, and only then commit; return the bytes written."""
    before, held = outcome.before, outcome.held
    with ExitStack() as stack:
        stage = stack.enter_context(staged(target, directory=adapter.is_directory, overwrite=overwrite))
        write_whole(adapter, before, held, stage)
        sides = stage_side_files(stack, outcome.side_files)
        with blamed(adapter):
            found = adapter.read(stage.path)
        check_read_back(found, held, target)
        before.sources.verify()  # what was not carried into the result, too
        size = sum(_size(each.path) for each in (stage, *sides))
        for each in (*sides, stage):  # the target last: if it is there, all is there
            each.publish(check=before.sources.check_unchanged)
    return size


def write_whole(adapter: Adapter, before: Checkpoint, held: Checkpoint, stage: Staged) -> None:
    """Let an adapter write to a stage; a source that is cut short meanwhile is told from a full disk."""
    with blamed(adapter):
        try:
            adapter.write(held, stage.path)
        except StorageError:
            before.sources.check_unchanged()  # a source that is cut short fails wherever it is read
            raise


def stage_side_files(stack: ExitStack, side_files: dict[Path, bytes]) -> list[Staged]:
    """Stage the files that a chain asks for beside its target; what may be replaced was judged before."""
    stages = []
    for path, content in side_files.items():
        real = Path(os.path.realpath(path))
        stack.enter_context(exclusive(real))
        stages.append(stack.enter_context(staged(real, directory=False, overwrite=True)))
        write_new(stages[-1].path, content)
    return stages


def check_read_back(
    found: Checkpoint, expected: Checkpoint, target: Path, *, untouched: Collection[int] = frozenset()
) -> None:
    """Compare what was read back, as anyone would read it, with what it was made from; `untouched` experts were not."""
    if found.param_names not in (None, expected.param_names):
        raise InvariantError("param_names came back changed", path=target)
    found = binding.bind(found)
    refuse(InvariantError, invariants.findings(found), target)
    found, expected = without_experts(found, untouched), without_experts(expected, untouched)
    refuse(InvariantError, differences_and_checksums(expected, found), target)
    found.sources.verify()


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return sum(file.stat().st_size for file in files)
