"""Apply a chain of transforms to a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vraxion_ckpt.checkpoint.invariants import router_owners
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.provenance import Record
from vraxion_ckpt.checkpoint.type_checks import wrong_type
from vraxion_ckpt.errors import PluginError, StorageError, errors_at
from vraxion_ckpt.experts.companion_updates import CompanionPolicy, follow
from vraxion_ckpt.optimizer.placement import place_as_listed, place_in_order, refuse_undecided
from vraxion_ckpt.plugins.lent_tensors import LentTensors, counted_writes, wrote_into
from vraxion_ckpt.plugins.options import recorded_options
from vraxion_ckpt.plugins.plugin_calls import defect, plugin_call
from vraxion_ckpt.plugins.transform import Effect, Step
from vraxion_ckpt.wording import count, numbered

NeighbourPolicy = Literal["refuse", "ignore"]


@dataclass(frozen=True)
class ChainPolicy:
    """How everything else follows a change of the model.

    Attributes:
        companions: how to handle companions, such as averages of the model.
        neighbours: how to handle neighbours, such as a Trainer's optimizer, that no longer fit the model.
        result_order: the names of all optimizer parameters of the result, in optimizer order; found by a rule if None.
    """

    companions: CompanionPolicy = "grow"
    neighbours: NeighbourPolicy = "refuse"
    result_order: Sequence[str] | None = None


FOLLOW = ChainPolicy()


def apply_chain(
    checkpoint: Checkpoint, chain: Iterable[Step], policy: ChainPolicy = FOLLOW, lent: LentTensors | None = None
) -> tuple[Checkpoint, dict[Path, bytes]]:
    """Apply transforms from left to right, and record each in the checkpoint's history.

    Args:
        checkpoint: the input of the first transform.
        chain: the transforms.
        policy: how companions and the optimizer follow.
        lent: the tensors of the checkpoint. Those that the transforms make are added.

    Returns:
        The result of the last transform, and the side files of all.

    Raises:
        TransformError: a transform refuses the checkpoint.
        BindingError: the order of the result's optimizer cannot be determined.
        StorageError: a transform raised an `OSError`.
        PluginError: a transform raised another error, returned a wrong type, or wrote into a tensor of its input.
            Writes that torch does not count are detected only in tensors that an earlier step created; for those of
            the source, see `vraxion_ckpt.plugins.lent_tensors`.
    """
    side_files: dict[Path, bytes] = {}
    source = checkpoint
    lent = lent if lent is not None else LentTensors(checkpoint)
    for step in chain:
        checkpoint, asked = _apply_step(checkpoint, step, policy, lent)
        lent.note(checkpoint)
        side_files.update(asked)
    if policy.result_order is not None:
        checkpoint = place_as_listed(source, checkpoint, policy.result_order)
    return checkpoint, side_files


def _followed(before: Checkpoint, after: Checkpoint, policy: ChainPolicy) -> Checkpoint:
    """Return a step's result with the optimizer in order and the companions updated like the head."""
    refuse_undecided(before, after)
    if policy.result_order is None:
        after = place_in_order(before, after)
    return follow(before, after, policy.companions)


def effect_of(step: Step) -> Effect:
    """Return the declared effect of a transform.

    Raises:
        PluginError: `Transform.effect` fails, or returns no `Effect` whose noise is None or a finite number ≥ 0.
    """
    with plugin_call(step.transform.name, step.distribution):
        effect = step.transform.effect()
    if wrong := wrong_type(effect, Effect, "effect"):
        raise _defect(step, wrong)
    if effect.noise is not None and not 0 <= effect.noise < math.inf:
        raise _defect(step, f"effect.noise is {effect.noise}, not a standard deviation")
    return effect


def _apply_step(
    before: Checkpoint, step: Step, policy: ChainPolicy, lent: LentTensors
) -> tuple[Checkpoint, dict[Path, bytes]]:
    """Apply one transform, check its result, update optimizer and companions, and record it in the history."""
    after, asked, options = _call(step, before)
    if written := [*counted_writes(before), *lent.altered_made()]:
        raise _defect(step, wrote_into(written))
    record = Record(
        name=step.transform.name,
        options=options,
        distribution=step.distribution,
        version=step.version,
        source=before.origin.path.name if before.origin.path else "",
        summary=_in_one_line(before, after),
    )
    after = _followed(before, after, policy)
    return replace(after, history=(*before.history, record), ancestors={}), asked


def _call(step: Step, before: Checkpoint) -> tuple[Checkpoint, dict[Path, bytes], dict[str, Any]]:
    """Run a transform's code. Return the checkpoint, the side files and the options, with checked types."""
    name = step.transform.name
    try:
        import torch

        # Without `no_grad`, the result would keep an autograd graph.
        with errors_at(key=name), plugin_call(name, step.distribution), torch.no_grad():
            after = step.transform.apply(before.copy())
        _check_result(step, before, after)
        with plugin_call(name, step.distribution), torch.no_grad():
            asked = step.transform.side_files(after.copy())
            asked = dict(asked) if isinstance(asked, Mapping) else asked
        if wrong := wrong_type(asked, dict[Path, bytes], "side_files"):
            raise _defect(step, wrong)
        return after, asked, recorded_options(step.transform)
    except OSError as error:
        raise StorageError.from_os_error(error, error.filename or name) from error


def _check_result(step: Step, before: Checkpoint, after: Checkpoint) -> None:
    """Check the types of a result. Open its new lazy experts, because opening them runs the transform's code."""
    import torch

    known = set(map(id, before.head.experts.values())) if before.head else set()
    wrong = wrong_type(after)
    if wrong is None:
        experts = after.head.experts.values() if after.head else ()
        new = [expert for expert in experts if not expert.is_open and id(expert) not in known]
        for expert in new:
            with plugin_call(step.transform.name, step.distribution), torch.no_grad():
                _ = expert.tensors
        wrong = wrong_type(after) if new else None
    if wrong is not None:
        raise _defect(step, f"returned a wrong value: {wrong}")


def _defect(step: Step, message: str) -> PluginError:
    return defect(message, step.transform.name, step.distribution)


def _in_one_line(before: Checkpoint, after: Checkpoint) -> str:
    parts = []
    if before.head and after.head and before.head.kind != after.head.kind:
        parts.append(f"{before.head.kind} → {after.head.kind} head")
    parts.append(f"{before.num_experts:,} → {count(after.num_experts, 'expert')}")
    moved = moved_addresses(before, after)
    if moved:
        parts.append(f"{count(moved, 'address')} moved")
    replaced = _replaced_experts(before, after)
    if replaced:
        parts.append(f"{numbered('expert', replaced)} replaced")
    if after.plan is not None and after.plan != before.plan:
        note = f" ({after.plan.note})" if after.plan.note else ""
        parts.append(f"plan: expert {after.plan.parent} gives up {count(len(after.plan.addresses), 'address')}{note}")
    return ", ".join(parts)


def _replaced_experts(before: Checkpoint, after: Checkpoint) -> list[int]:
    """List the experts whose tensors were replaced; empty if the head changed in any other way."""
    if before.head is None or after.head is None or before.head.experts.keys() != after.head.experts.keys():
        return []
    if before.head.kind != after.head.kind or moved_addresses(before, after):
        return []
    return [i for i, expert in after.head.experts.items() if expert is not before.head.experts[i]]


def moved_addresses(before: Checkpoint, after: Checkpoint) -> int:
    """Count the ring addresses with another owner than before; 0 if the rings cannot be compared.

    A renumbered expert counts as the same owner.
    """
    was, now = before.router_reference, after.router_reference
    if was is None or now is None or before.head is None or after.head is None:
        return 0
    if was is now and before.head.experts == after.head.experts:
        return 0
    old, new = router_owners(was), router_owners(now)
    if old.shape != new.shape:
        return 0
    known = {id(expert): i for i, expert in before.head.experts.items()}
    former = np.arange(max(before.num_experts, after.num_experts, 1))
    if new.size and not 0 <= new.min() <= new.max() < len(former):
        return 0  # the invariants refuse an owner that does not exist
    for i, expert in after.head.experts.items():
        former[i] = known.get(id(expert), i)
    return int(np.count_nonzero(old != former[new]))
