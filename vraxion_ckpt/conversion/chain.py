"""Apply a chain of transforms, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vraxion_ckpt.checkpoint.invariants import router_owners
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.provenance import Record
from vraxion_ckpt.checkpoint.type_checks import wrong_type
from vraxion_ckpt.errors import PluginError, StorageError, errors_at
from vraxion_ckpt.experts.companion_updates import CompanionPolicy, follow
from vraxion_ckpt.optimizer.placement import place_as_listed, place_in_order, refuse_undecided
from vraxion_ckpt.plugins.lent_tensors import MadeTensors, WriteCounts, wrote_into
from vraxion_ckpt.plugins.options import resolved
from vraxion_ckpt.plugins.plugin_calls import defect, plugin_call
from vraxion_ckpt.plugins.transform import Effect, Step
from vraxion_ckpt.wording import count, numbered


@dataclass(frozen=True)
class ChainPolicy:
    """What the user says about all that follows when a chain changes the head.

    Attributes:
        companions: what becomes of averages and the like.
        result_order: the names of the result's optimizer in its order; found by rule if not given.
    """

    companions: CompanionPolicy = "grow"
    result_order: Sequence[str] | None = None


FOLLOW = ChainPolicy()


def apply_chain(
    checkpoint: Checkpoint, chain: Iterable[Step], policy: ChainPolicy = FOLLOW, made: MadeTensors | None = None
) -> tuple[Checkpoint, dict[Path, bytes]]:
    """Apply transforms from left to right, recording each in the checkpoint's history.

    Args:
        checkpoint: what is lent to the first.
        chain: the transforms.
        policy: what the user says about what follows.
        made: takes the checksums of the tensors that they make.

    Returns:
        The last checkpoint and the side files that transforms ask for.

    Raises:
        TransformError: a transform refuses.
        PluginError: a transform fails in another way, returns another type than it must, or writes into a tensor that
            it was lent. What torch does not count is seen in tensors that an earlier step has made; for those of
            the source, see `vraxion_ckpt.plugins.lent_tensors`.
    """
    side_files: dict[Path, bytes] = {}
    source = checkpoint
    made = made if made is not None else MadeTensors(checkpoint)
    for step in chain:
        checkpoint, asked = _apply_step(checkpoint, step, policy, made)
        made.note(checkpoint)
        side_files.update(asked)
    if policy.result_order is not None:
        checkpoint = place_as_listed(source, checkpoint, policy.result_order)
    return checkpoint, side_files


def _followed(before: Checkpoint, after: Checkpoint, policy: ChainPolicy) -> Checkpoint:
    """Return a step's result with the optimizer in order, and averages of the model changed as the head was."""
    refuse_undecided(before, after)
    if policy.result_order is None:
        after = place_in_order(before, after)
    return follow(before, after, policy.companions)


def effect_of(step: Step) -> Effect:
    """Ask a transform for its `Transform.effect`.

    Raises:
        PluginError: it fails, or returns something else than an `Effect` with a finite noise ≥ 0 or None.
    """
    with plugin_call(step.transform.name, step.distribution):
        effect = step.transform.effect()
    if wrong := wrong_type(effect, Effect, "effect"):
        raise _defect(step, wrong)
    if effect.noise is not None and not 0 <= effect.noise < math.inf:
        raise _defect(step, f"effect.noise is {effect.noise}, not a standard deviation")
    return effect


def _apply_step(
    before: Checkpoint, step: Step, policy: ChainPolicy, made: MadeTensors
) -> tuple[Checkpoint, dict[Path, bytes]]:
    """Apply one transform, check what it returned and did, let the rest follow, and record it."""
    counts = WriteCounts(before)
    after, asked, options = _call(step, before)
    if written := [*counts.risen(), *made.altered()]:
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
    """Run a transform's code; return the checkpoint, the side files and the options, all of the right types."""
    name = step.transform.name
    try:
        # Without `no_grad`, a graph would be dragged along.
        with errors_at(key=name), plugin_call(name, step.distribution), torch.no_grad():
            after = step.transform.apply(before.copy())
        _check_result(step, before, after)
        with plugin_call(name, step.distribution), torch.no_grad():
            asked = step.transform.side_files(after.copy())
            asked = dict(asked) if isinstance(asked, Mapping) else asked
        if wrong := wrong_type(asked, dict[Path, bytes], "side_files"):
            raise _defect(step, wrong)
        return after, asked, resolved(step.transform)
    except OSError as error:
        raise StorageError.from_os_error(error, error.filename or name) from error


def _check_result(step: Step, before: Checkpoint, after: Checkpoint) -> None:
    """Check the types of a result; what it opens lazily is the transform's code, and opened here."""
    known = set(map(id, before.head.experts.values())) if before.head else set()
    wrong = wrong_type(after)
    if wrong is None:
        for expert in after.head.experts.values() if after.head else ():
            if not expert.is_open and id(expert) not in known:
                with plugin_call(step.transform.name, step.distribution), torch.no_grad():
                    _ = expert.tensors
        wrong = wrong_type(after)
    if wrong is not None:
        raise _defect(step, f"returned what it must not: {wrong}")


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
    """List the experts that are other tensors now, where a head was not rebuilt in any other way."""
    if before.head is None or after.head is None or before.head.experts.keys() != after.head.experts.keys():
        return []
    if before.head.kind != after.head.kind or moved_addresses(before, after):
        return []
    return [i for i, expert in after.head.experts.items() if expert is not before.head.experts[i]]


def moved_addresses(before: Checkpoint, after: Checkpoint) -> int:
    """Count the ring addresses that another expert owns now; 0 where the rings cannot be compared.

    An expert that was only renumbered is the same expert.
    """
    if before.router_map is None or after.router_map is None or before.head is None or after.head is None:
        return 0
    old, new = router_owners(before.router_map), router_owners(after.router_map)
    if old.shape != new.shape:
        return 0
    known = {id(expert): i for i, expert in before.head.experts.items()}
    former = np.arange(max(before.num_experts, after.num_experts, 1))
    if new.size and not 0 <= new.min() <= new.max() < len(former):
        return 0  # an owner that does not exist is refused later, see `vraxion_ckpt.checkpoint.invariants`
    for i, expert in after.head.experts.items():
        former[i] = known.get(id(expert), i)
    return int(np.count_nonzero(old != former[new]))
