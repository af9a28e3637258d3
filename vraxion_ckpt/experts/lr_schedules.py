"""Update learning-rate schedulers in the payload when param groups are added or removed."""

from __future__ import annotations

import copy
from typing import Any

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.errors import TransformError
from vraxion_ckpt.experts.companions import COMPANION_HINT

# Entries of torch's learning-rate schedulers that have one value for each param group.
_PER_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "lr_lambdas", "base_momentums", "max_momentums")


def with_schedules(before: Checkpoint, after: Checkpoint) -> Checkpoint:
    """Return `after` with one entry for each of its param groups in the payload's learning-rate schedulers.

    Raises:
        TransformError: the source of a new param group is unknown.
    """
    old, new = before.optimizer, after.optimizer
    if old is None or new is None or len(old.groups) == len(new.groups):
        return after
    group_of = {name: number for number, group in enumerate(old.groups) for name in group.params}
    sources = [group_of.get(after.former_name(group.params[0])) if group.params else None for group in new.groups]

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            result = copy.copy(value)
            is_schedule = "base_lrs" in value or "_last_lr" in value
            for key, entry in value.items():
                is_list = is_schedule and key in _PER_GROUP and isinstance(entry, list | tuple)
                if not is_list or len(entry) != len(old.groups):
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
