"""Run a chain, and check its result before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.head import HeadKind
from vraxion_ckpt.checkpoint.invariants import Preservation
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.neighbours import Neighbours, sort_neighbours
from vraxion_ckpt.checkpoint.provenance import Record
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.conversion.carry_neighbours import with_record
from vraxion_ckpt.conversion.chain import FOLLOW, ChainPolicy, NeighbourPolicy, apply_chain, effect_of
from vraxion_ckpt.conversion.summary import Outcome
from vraxion_ckpt.conversion.targets import check_side_files
from vraxion_ckpt.errors import (
    BindingError,
    CkptError,
    CkptWarning,
    InvariantError,
    LossError,
    TransformError,
    UsageError,
)
from vraxion_ckpt.experts.companion_updates import CompanionPolicy
from vraxion_ckpt.experts.companions import find_companions
from vraxion_ckpt.optimizer import placement
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter, Loss
from vraxion_ckpt.plugins.lent_tensors import LentTensors, wrote_into
from vraxion_ckpt.plugins.options import defect_of
from vraxion_ckpt.plugins.plugin_calls import defect, observed
from vraxion_ckpt.plugins.transform import Step
from vraxion_ckpt.reading.opening import OptimizerPolicy, refuse
from vraxion_ckpt.reading.read_options import check_names
from vraxion_ckpt.wording import count, listed

LossPolicy = Literal["raise", "warn", "ignore"]


def check_policy(losses: LossPolicy) -> None:
    """Check the value of `losses`.

    Raises:
        UsageError: it is unknown.
    """
    if losses not in get_args(LossPolicy):
        raise UsageError(f"losses={losses!r}: must be one of {', '.join(get_args(LossPolicy))}")


def chain_policy(
    companions: CompanionPolicy, neighbours: NeighbourPolicy, result_order: Sequence[str] | None
) -> ChainPolicy:
    """Return the policy for companions, neighbours and the optimizer.

    Raises:
        UsageError: `companions` or `neighbours` is unknown, or `result_order` is not a list of names.
    """
    if companions not in get_args(CompanionPolicy):
        raise UsageError(f"companions={companions!r}: must be one of {', '.join(get_args(CompanionPolicy))}")
    if neighbours not in get_args(NeighbourPolicy):
        raise UsageError(f"neighbours={neighbours!r}: must be one of {', '.join(get_args(NeighbourPolicy))}")
    check_names(result_order, "result_order")
    return ChainPolicy(companions, neighbours, result_order)


@dataclass(frozen=True)
class Applied:
    """The checked result of a chain, before any target is considered."""

    before: Checkpoint
    after: Checkpoint
    chain: Sequence[Step]
    side_files: dict[Path, bytes]
    preservation: Preservation | None
    neighbours: Neighbours
    policy: ChainPolicy


def apply(
    before: Checkpoint,
    chain: Sequence[Step],
    lent: LentTensors,
    reopen: Callable[[], Checkpoint],
    record: Record | None = None,
    policy: ChainPolicy = FOLLOW,
) -> Applied:
    """Apply a chain and check its result.

    Args:
        before: the checkpoint to change.
        chain: the transforms.
        lent: the tensors of `before`.
        reopen: opens `before` once more, to find the step that wrote into a tensor.
        record: inserted into the history before the records of the steps.
        policy: how companions, neighbours and the optimizer follow.

    Raises:
        TransformError: a transform refuses the checkpoint.
        BindingError: the order of the result's optimizer cannot be determined, or the optimizer is incomplete.
        InvariantError: the result violates an invariant or a declared effect.
        PluginError: a step failed, or wrote into a tensor of the source.
    """
    begun = before if record is None else replace(before, history=(*before.history, record))
    try:
        after, side_files = apply_chain(begun, chain, policy, lent)
    except CkptError:
        if lent.steps:  # a write of an earlier step may have caused the error of a later one
            _check_lent(before, lent, reopen, chain, policy)
        raise
    if chain:
        _check_lent(before, lent, reopen, chain, policy)
    preservation = _check_result(before, after, chain)
    return Applied(before, after, chain, side_files, preservation, sort_neighbours(before, after), policy)


def _check_lent(
    before: Checkpoint,
    lent: LentTensors,
    reopen: Callable[[], Checkpoint],
    chain: Sequence[Step],
    policy: ChainPolicy,
) -> None:
    """Refuse a chain that has written into lent tensors. Run it again to name the plugin."""
    written = lent.altered()
    if not written:
        return
    before.sources.check_unchanged()
    found: list[tuple[str, str]] = []
    again = reopen()
    second = LentTensors(again)

    def look(name: str, distribution: str) -> None:
        if not found and second.altered():
            found.append((name, distribution))

    with observed(look), suppress(CkptError), warnings.catch_warnings():
        warnings.simplefilter("ignore", CkptWarning)
        apply_chain(again, chain, policy, second)
    if not found:  # the second run did not write
        names = ", ".join(step.transform.name for step in chain)
        found.append((names, " or ".join(dict.fromkeys(step.distribution for step in chain))))
    raise defect(wrote_into(written), *found[0])


def judge(applied: Applied, adapter: Adapter, target: Path, losses: LossPolicy, *, overwrite: bool) -> Outcome:
    """Check the result of a chain for one target.

    Raises:
        UsageError: a side file cannot be written.
        TransformError: a neighbour no longer fits, and the policy is ``refuse``.
        LossError: the format cannot hold everything, and `losses` is ``raise``.
    """
    before, after = applied.before, applied.after
    side_targets = check_side_files(applied.side_files, before, target, applied.chain, overwrite=overwrite)
    lost = _check_losses(adapter, before, after, losses)
    neighbours = applied.neighbours if adapter_calls.keeps_neighbours(adapter) else Neighbours()
    if neighbours.stale and applied.policy.neighbours == "refuse":
        raise _stale(neighbours, before)
    held = adapter_calls.held(adapter, after)
    if not lost and (missing := _missing(after, held)):
        raise defect_of(adapter, f"held lacks {missing}, although losses lists nothing")
    held = with_record(held, before.origin.neighbours, adapter)
    asked = [Loss(key, "dropped, as asked") for key in before.origin.dropped]
    all_losses = (*asked, *lost)
    return Outcome(before, after, held, applied.side_files, side_targets, applied.preservation, all_losses, neighbours)


def _stale(neighbours: Neighbours, before: Checkpoint) -> TransformError:
    """Return the error for neighbours that no longer fit."""
    names = listed([neighbour.name for neighbour in neighbours.stale])
    return TransformError(
        f"the chain changes the model, which these files beside the weights would not fit any more: {names}",
        path=before.origin.path,
        hint="pass --neighbours ignore to leave them out of the result",
    )


def _missing(after: Checkpoint, held: Checkpoint) -> str | None:
    """Return what a format leaves out of a checkpoint, as far as names show it."""
    if after.optimizer is not None and held.optimizer is None:
        return "the optimizer"
    if gone := [*(after.core.keys() - held.core.keys()), *(after.payload.keys() - held.payload.keys())]:
        return listed(sorted(map(str, gone)), 3)
    return "experts" if after.num_experts != held.num_experts else None


def _check_result(before: Checkpoint, after: Checkpoint, chain: Sequence[Step]) -> Preservation | None:
    """Check the invariants of a chain's result and the declared effects of its steps."""
    refuse(InvariantError, map(_of_result, invariants.invariant_findings(after)), None)
    refuse(InvariantError, map(_of_result, invariants.sharing_findings(before, after)), None)
    if not any(placement.missing_parameters(before)):
        refuse(InvariantError, map(_of_result, map(_untrained, placement.missing_parameters(after))), None)
    noises = [effect_of(step).noise for step in chain]
    known = [noise for noise in noises if noise is not None]
    if chain and len(known) == len(noises):
        refuse(InvariantError, _changed_core(before, after), None)
    preservation = invariants.preservation(before, after, sum(known) if len(known) == len(noises) else None)
    if preservation and not preservation.as_asked:
        raise InvariantError(
            f"the chain must preserve the model's function: {preservation}",
            path=after.origin.path,
        )
    if chain and after.head and after.head.kind is HeadKind.EXPERTS and after.num_experts == 1:
        message = (
            "one expert under head.experts.* is loaded by no runtime; let mitosis_split or experts_to_single follow"
        )
        warnings.warn(message, CkptWarning, stacklevel=4)
    return preservation


def _changed_core(before: Checkpoint, after: Checkpoint) -> Iterator[str]:
    """Yield what changed outside the head, although every transform declares that it keeps the function.

    Copies of the head, such as averages, are not part of the function. They follow the head, or are dropped.
    """
    new = after.core.references()
    changed = [name for name, tensor in before.core.references().items() if not _is_kept(before, tensor, new.get(name))]
    if changed:
        copies = tuple(each.prefix for each in find_companions(before) if each.place == ("model",))
        for name in changed:
            if not name.startswith(copies):
                yield f"every transform declares that it keeps the function, but {name} has changed"


def _is_kept(before: Checkpoint, tensor: TensorRef, new: TensorRef | None) -> bool:
    return new is not None and (tensor is before.router_reference or same_bits(tensor, new))


def _of_result(finding: str) -> str:
    return f"the result of the chain violates an invariant: {finding}"


def _untrained(name: str) -> str:
    return f"the optimizer lacks {name}, but has the same parameter of other experts"


def check_complete(checkpoint: Checkpoint, policy: OptimizerPolicy) -> None:
    """Refuse an optimizer that has parameters of some experts but not of others, unless the policy accepts it.

    Raises:
        BindingError: the key is the first missing parameter.
    """
    lacking = list(placement.missing_parameters(checkpoint)) if policy == "keep" else []
    if lacking and placement.is_undecided_in_head(checkpoint):
        raise BindingError(
            f"the optimizer lacks {count(len(lacking), 'parameter')} of experts, and the file does not record which "
            "ones: no trainer that trains all experts can load it",
            path=checkpoint.origin.path,
            key="optimizer",
            hint="name the parameters that it has (--param-names FILE) and add the others without state (--optimizer "
            "complete); if an expert is frozen, keep the optimizer unchanged (--optimizer partial)",
        )
    if lacking:
        raise BindingError(
            f"the optimizer lacks {count(len(lacking), 'parameter')} of experts (this is the first), but has the same "
            "parameters of other experts: no trainer that trains all experts can load it",
            path=checkpoint.origin.path,
            key=lacking[0],
            hint="add the missing parameters without state (--optimizer complete); if the expert is frozen, keep the "
            "optimizer unchanged (--optimizer partial)",
        )


def _check_losses(adapter: Adapter, before: Checkpoint, after: Checkpoint, policy: LossPolicy) -> list[Loss]:
    """Return the parts that the format cannot hold; raise or warn as the policy says."""
    lost = adapter_calls.losses(adapter, after) + adapter_calls.lost_neighbours(adapter, before)
    if lost and policy == "raise":
        listed = "; ".join(map(str, lost))
        raise LossError(f"{adapter.name} cannot hold {listed}", hint="pass --losses warn to drop these parts")
    if policy == "warn":
        for loss in lost:
            warnings.warn(f"{adapter.name} cannot hold {loss}", CkptWarning, stacklevel=3)
    return lost
