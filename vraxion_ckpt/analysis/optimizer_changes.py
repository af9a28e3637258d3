"""Compare the optimizers of two checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vraxion_ckpt.analysis.changes import Change
from vraxion_ckpt.analysis.value_changes import NameMap, added, entry_changes, order_changes, removed, value_changes
from vraxion_ckpt.checkpoint.model import Checkpoint, unbound_state_dict
from vraxion_ckpt.checkpoint.optimizer_state import ParamGroup
from vraxion_ckpt.checkpoint.plain_data import size_of
from vraxion_ckpt.checkpoint.tensor_dict import referenced
from vraxion_ckpt.checkpoint.torch_optimizer import unbind
from vraxion_ckpt.wording import count


def optimizer_changes(
    a: Checkpoint, b: Checkpoint, names: NameMap, advance: Callable[[int], object]
) -> tuple[list[Change], int]:
    """Return the differences of the optimizers, and the number of bit-identical slots."""
    if a.optimizer is None or b.optimizer is None:
        old, new = (unbind(c.optimizer) if c.optimizer else referenced(unbound_state_dict(c)) for c in (a, b))
        if old is None or new is None:
            gone = [removed("optimizer", _in_short(old))] if old is not None else []
            return gone + ([added("optimizer", _in_short(new))] if new is not None else []), 0
        found = list(value_changes(old, new, "optimizer"))
        return found, 0 if found else sum(map(len, new.get("state", {}).values()))
    changes: list[Change] = []
    identical, met = 0, set()
    old_state, new_state = a.optimizer.state.references(), b.optimizer.state.references()
    for name, slots in old_state.items():
        other = names(name)
        others = new_state.get(other, {}) if other is not None else {}
        met.add(other)
        for slot in [*slots, *(slot for slot in others if slot not in slots)]:
            found = list(entry_changes(slots, others, slot, f"{name}.{slot}", f"{other}.{slot}"))
            changes += found
            identical += not found
        advance(size_of(others))
    for name, slots in new_state.items():
        if name not in met:
            changes += [added(f"{name}.{slot}", value) for slot, value in slots.items()]
    old_form, new_form = ({str(part): str(part.form) for part in o.parts} for o in (a.optimizer, b.optimizer))
    changes += value_changes(old_form, new_form, "form of the optimizer")
    changes += _group_changes(a.optimizer.groups, b.optimizer.groups, names)
    changes += value_changes(a.optimizer.extra, b.optimizer.extra, "optimizer")
    changes += order_changes(a.optimizer.params, b.optimizer.params, names, "parameters of the optimizer")
    return changes, identical


def _in_short(state_dict: Mapping[str, Any]) -> str:
    number = sum(len(group.get("params", ())) for group in state_dict.get("param_groups", ()))
    return f"{count(number, 'parameter')}, {len(state_dict.get('state', ()))} with state"


def _group_changes(old: Sequence[ParamGroup], new: Sequence[ParamGroup], names: NameMap) -> Iterator[Change]:
    for i, (a, b) in enumerate(zip(old, new, strict=False)):
        yield from value_changes(a.options, b.options, f"group {i}")
        former = [names(name) for name in a.params]
        known, now = set(former), set(b.params)
        yield from (
            removed(f"group {i}: {n}", "trained") for n, f in zip(a.params, former, strict=True) if f not in now
        )
        yield from (added(f"group {i}: {name}", "trained") for name in b.params if name not in known)
    yield from (removed(f"group {i}", count(len(old[i].params), "parameter")) for i in range(len(new), len(old)))
    yield from (added(f"group {i}", count(len(new[i].params), "parameter")) for i in range(len(old), len(new)))
