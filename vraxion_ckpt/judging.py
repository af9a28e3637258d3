"""Run a chain and judge what comes of it: all that can be refused before a byte is written."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from vraxion_ckpt import invariants, placement
from vraxion_ckpt.adapter import Adapter, Loss
from vraxion_ckpt.companions import CompanionPolicy
from vraxion_ckpt.errors import BindingError, CkptWarning, InvariantError, LossError, UsageError
from vraxion_ckpt.invariants import Preservation
from vraxion_ckpt.model import Checkpoint, HeadKind, Record
from vraxion_ckpt.reading import OptimizerPolicy, blamed, refuse
from vraxion_ckpt.summary import Outcome
from vraxion_ckpt.targets import check_side_files
from vraxion_ckpt.transform import FOLLOW, ChainPolicy, Step, apply_chain

LossPolicy = Literal["raise", "warn", "ignore"]


def check_policy(losses: LossPolicy) -> None:
    """Refuse a policy that there is not."""
    if losses not in ("raise", "warn", "ignore"):
        raise UsageError(f"losses={losses!r}: none of raise, warn, ignore")


def chain_policy(companions: CompanionPolicy, result_order: Sequence[str] | None) -> ChainPolicy:
    """Return what the user says about all that follows a chain; refuse what there is not."""
    if companions not in get_args(CompanionPolicy):
        raise UsageError(f"companions={companions!r}: none of {', '.join(get_args(CompanionPolicy))}")
    return ChainPolicy(companions, result_order)


@dataclass(frozen=True)
class Applied:
    """What a chain has made of a checkpoint, whatever is to be written of it."""

    before: Checkpoint
    after: Checkpoint
    chain: Sequence[Step]
    side_files: dict[Path, bytes]
    preservation: Preservation | None


def apply(
    before: Checkpoint, chain: Sequence[Step], record: Record | None = None, policy: ChainPolicy = FOLLOW
) -> Applied:
    """Apply a chain, and hold it to what must be true after it; `record` comes before those of its steps."""
    begun = before if record is None else replace(before, history=(*before.history, record))
    after, side_files = apply_chain(begun, chain, policy)
    return Applied(before, after, chain, side_files, _check_result(before, after, chain))


def judge(applied: Applied, adapter: Adapter, target: Path, losses: LossPolicy, *, overwrite: bool) -> Outcome:
    """Judge what a format will hold of it: all that can be refused before a byte is written."""
    before, after = applied.before, applied.after
    besides = check_side_files(applied.side_files, before, target, applied.chain, overwrite=overwrite)
    lost = _check_losses(adapter, after, losses)
    with blamed(adapter):
        held = adapter.held(after)
    return Outcome(before, after, held, applied.side_files, besides, applied.preservation, tuple(lost))


def _check_result(before: Checkpoint, after: Checkpoint, chain: Sequence[Step]) -> Preservation | None:
    """Hold the chain to what must be true after it."""
    refuse(InvariantError, invariants.findings(after), after.origin.path)
    refuse(InvariantError, invariants.sharing_findings(before, after), after.origin.path)
    if not any(placement.lacking(before)):
        refuse(InvariantError, map(_untrained, placement.lacking(after)), after.origin.path)
    noises = [step.transform.function_noise() for step in chain]
    known = [noise for noise in noises if noise is not None]
    preservation = invariants.preservation(before, after, sum(known) if len(known) == len(noises) else None)
    if preservation and not preservation.as_asked:
        raise InvariantError(f"the function was to be preserved: {preservation}", path=after.origin.path)
    if chain and after.head and after.head.kind is HeadKind.EXPERTS and after.num_experts == 1:
        message = (
            "one expert under head.experts.* is loaded by no runtime; let mitosis_split or experts_to_single follow"
        )
        warnings.warn(message, CkptWarning, stacklevel=4)
    return preservation


def _untrained(name: str) -> str:
    return f"the optimizer trains the same leaf of other experts, but not {name}"


def check_complete(checkpoint: Checkpoint, policy: OptimizerPolicy) -> None:
    """Refuse an optimizer that lacks parameters of experts although it trains their siblings, unless told to keep it.

    Raises:
        BindingError: naming the first parameter.
    """
    lacking = list(placement.lacking(checkpoint)) if policy == "keep" else []
    if lacking:
        more = f" ({len(lacking)} in all)" if lacking[1:] else ""
        raise BindingError(
            f"the optimizer does not list this parameter{more}, although it lists those of other experts: no trainer "
            "that trains all experts can load it",
            path=checkpoint.origin.path,
            key=lacking[0],
            hint="add what it lacks, without state (--optimizer complete), or, if the expert is frozen, carry it as it "
            "is (--optimizer partial)",
        )


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
