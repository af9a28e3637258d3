"""Update learning-rate schedulers in the payload when param groups are added or removed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, OptimizerForm
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.errors import TransformError
from vraxion_ckpt.experts.companions import COMPANION_HINT

# Entries of torch's learning-rate schedulers that have one value for each param group.
_PER_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "lr_lambdas", "base_momentums", "max_momentums")


def with_schedules(before: Checkpoint, after: Checkpoint) -> Checkpoint:
    """Return `after` with one entry for each of its param groups in the payload's learning-rate schedulers.

    Raises:
        TransformError: the source of a new param group is unknown, or to which of several optimizers a scheduler
            belongs.
    """
    old, new = before.optimizer, after.optimizer
    if old is None or new is None or len(old.groups) == len(new.groups) or len(old.parts) != len(new.parts):
        return after
    both = zip(old.each_part(), new.each_part(), strict=True)
    parts = [_Groups.of(was, now, after) for was, now in both if not _has_unknown_groups(was)]

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            result = copy.copy(value)
            is_schedule = "base_lrs" in value or "_last_lr" in value
            for key, entry in value.items():
                is_list = is_schedule and key in _PER_GROUP and isinstance(entry, list | tuple)
                sources = _sources(value, len(entry), parts, key) if is_list else None
                if sources is None:
                    result[key] = changed(entry)
                    continue
                if None in sources:
                    message = "has an entry for each param group, but the source of a new param group is unknown"
                    raise TransformError(message, key=str(key), hint=COMPANION_HINT)
                result[key] = type(entry)([copy.deepcopy(entry[number]) for number in sources])
            return result
        if isinstance(value, list | tuple) and any(isinstance(entry, dict | list | tuple) for entry in value):
            return type(value)([changed(entry) for entry in value])
        return value

    after.payload = TensorDict({key: changed(value) for key, value in after.payload.as_stored().items()})
    return after


def _has_unknown_groups(optimizer: Optimizer) -> bool:
    """Return whether a lone parameter has its group to itself only because the file has options for each parameter."""
    (part,) = optimizer.parts
    return part.form is OptimizerForm.FLATTENED and part.listed is None and len(optimizer.groups) == 1


@dataclass(frozen=True)
class _Groups:
    """The param groups of one optimizer before and after a step.

    Attributes:
        old: the options of each group before the step.
        sources: the index before the step of each group after it, or None if that is unknown.
    """

    old: list[dict[str, Any]]
    sources: list[int | None]

    @classmethod
    def of(cls, old: Optimizer, new: Optimizer, after: Checkpoint) -> _Groups:
        group_of = {name: number for number, group in enumerate(old.groups) for name in group.params}
        sources = [group_of.get(after.former_name(group.params[0])) if group.params else None for group in new.groups]
        return cls([group.options for group in old.groups], sources)


def _sources(schedule: dict[str, Any], size: int, parts: list[_Groups], key: str) -> list[int | None] | None:
    """Return the source of each entry of a scheduler's list, or None if the list stays as it is.

    The optimizer is the one with as many groups. Among several, it is the one whose groups have the scheduler's rates.
    """
    found = [part for part in parts if len(part.old) == size]
    if len(found) > 1:
        rates = [
            part
            for part in found
            if all(
                option not in group or group[option] == rate
                for rates, option in (("base_lrs", "initial_lr"), ("_last_lr", "lr"))
                for group, rate in zip(part.old, schedule.get(rates) or (), strict=False)
            )
        ]
        found = rates or found
    found = [part for number, part in enumerate(found) if part.sources not in [each.sources for each in found[:number]]]
    if len(found) > 1:
        raise TransformError(
            "has an entry for each param group, but several optimizers have as many, and they change differently",
            key=key,
            hint="drop the scheduler (--drop-key KEY)",
        )
    if not found or found[0].sources == list(range(size)):
        return None
    return found[0].sources
