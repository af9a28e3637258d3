"""Find suspicious values, slots, steps, dtypes and names in an optimizer state that can be loaded.

Parameters are compared with similar ones: of the same param group, or of the same dtype. No rule depends on the kind
of optimizer; slots that cannot be negative are recognised by their names.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from vraxion_ckpt.analysis.findings import Finding
from vraxion_ckpt.checkpoint.model import Checkpoint, unbound_state_dict
from vraxion_ckpt.checkpoint.plain_data import as_comparable, as_numbers, in_pieces
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.wording import count, listed

if TYPE_CHECKING:
    from torch import Tensor

# Sums, means or maxima of squares or of absolute values, in torch's optimizers and in Hugging Face's Adafactor.
_NEVER_NEGATIVE = frozenset(
    {
        *("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"),
        *("variance", "row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"),
    }
)
_STATE = "optimizer.state."


def is_never_negative(place: str, tensor: TensorRef) -> bool:
    """Return whether the tensor at a place (``optimizer.state.NAME.SLOT``) is a slot that cannot be negative."""
    slot = place.rpartition(".")[2]
    return place.startswith(_STATE) and slot in _NEVER_NEGATIVE and tensor.is_floating_point()


def count_negative(tensor: Tensor) -> int:
    """Count the elements below zero. The tensor is read in pieces. −0 is not below zero."""
    found = 0
    for (piece,) in in_pieces(tensor):
        numbers = as_comparable(piece)
        if numbers is not None:
            found += int((numbers < 0).sum())
    return found


def about_optimizer(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Check the optimizer state without reading large tensors and without opening experts."""
    if checkpoint.head is None or all(expert.is_open for expert in checkpoint.head.experts.values()):
        yield from _about_order(checkpoint)
    groups = _groups(checkpoint)
    for number, group in enumerate(groups):
        yield from _about_missing(number, group)
    stateful = [parameter for group in groups for parameter in group if parameter.slots]
    yield from _about_steps(stateful)
    yield from _about_dtypes(stateful)


@dataclass(frozen=True)
class _Parameter:
    """A parameter in a param group.

    Attributes:
        slots: its optimizer state; empty if it has none.
        dimensions: 0, 1, or 2 for two and more. Some optimizers, such as Adafactor, have other slots for matrices than
            for vectors.
        dtype: the dtype of the parameter, or None if it is unknown.
    """

    name: str
    slots: Mapping[str, Any]
    dimensions: int
    dtype: str | None


def _groups(checkpoint: Checkpoint) -> list[list[_Parameter]]:
    """Return the param groups. Without parameter names, parameters are named by their ids."""
    tensors = checkpoint.open_references()
    optimizer = checkpoint.optimizer
    if optimizer is not None:
        slots = optimizer.state.references()
        return [[_parameter(n, slots.get(n), tensors.get(n)) for n in g.params] for g in optimizer.groups]
    unbound = unbound_state_dict(checkpoint)
    raw = unbound.references() if unbound is not None else {}
    groups, state = raw.get("param_groups"), raw.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict):
        return []
    listed = [group.get("params") if isinstance(group, dict) else None for group in groups]
    return [
        [_parameter(f"parameter {i}", state.get(i), None) for i in ids if isinstance(i, int)]
        for ids in listed
        if isinstance(ids, list)
    ]


def _parameter(name: str, slots: Any, tensor: TensorRef | None) -> _Parameter:
    slots = slots if isinstance(slots, dict) else {}
    shaped = [tensor] if tensor is not None else [value for value in slots.values() if isinstance(value, TensorRef)]
    dimensions = max((value.ndim for value in shaped), default=0)
    return _Parameter(name, slots, min(dimensions, 2), tensor.dtype if tensor is not None else None)


def _about_missing(number: int, group: list[_Parameter]) -> Iterator[Finding]:
    """Report parameters of a group that lack a state, or a slot, that most others have."""
    without = [parameter.name for parameter in group if not parameter.slots]
    if without and len(without) < len(group):
        yield Finding.note(
            "state",
            f"{len(without)} of {len(group)} parameters have no state ({listed(without, 4)}): "
            "they had no gradient, or their state was lost",
            where=f"optimizer group {number}",
        )
    alike: dict[int, list[_Parameter]] = defaultdict(list)
    for parameter in group:
        if parameter.slots:
            alike[parameter.dimensions].append(parameter)
    for parameters in alike.values():
        counts = Counter(slot for parameter in parameters for slot in parameter.slots)
        for slot, holders in counts.items():
            lacking = [parameter.name for parameter in parameters if slot not in parameter.slots]
            if lacking and 2 * holders >= len(parameters):
                yield Finding.warning(
                    "state",
                    f"slot {slot} is missing for {listed(lacking, 4)}, not for {count(holders, 'similar parameter')}",
                    where=f"optimizer group {number}",
                )


def _about_steps(parameters: list[_Parameter]) -> Iterator[Finding]:
    """Report steps that are not valid, and steps that differ between parameters."""
    steps: dict[float, list[str]] = defaultdict(list)
    for parameter in parameters:
        if "step" not in parameter.slots:
            continue
        step = _as_number(parameter.slots["step"])
        if step is None or step < 0:
            what = "is not a number" if step is None else f"is negative: {step:g}"
            where = f"{_STATE}{parameter.name}.step"
            yield Finding.warning("step", what, where=where)
        elif step == step:  # NaN is reported as not finite
            steps[step].append(parameter.name)
    if len(steps) > 1:
        usual, *others = sorted(steps, key=lambda step: (-len(steps[step]), -step))
        rare = [f"{step:g} for {len(steps[step])} ({listed(steps[step], 4)})" for step in others]
        what = (
            f"step is {usual:g} for {count(len(steps[usual]), 'parameter')}, but {listed(rare, 4, '; ')}: "
            "experts that were not routed to have fewer steps"
        )
        yield Finding.note("step", what, where="optimizer")


def _as_number(value: Any) -> float | None:
    if isinstance(value, TensorRef):
        numbers = as_numbers(value.read_only_tensor()) if value.numel() == 1 and not value.is_complex() else None
        return float(numbers.reshape(())) if numbers is not None else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _about_dtypes(parameters: list[_Parameter]) -> Iterator[Finding]:
    """Report slots whose dtype differs from that of the same slot of other parameters of the same dtype."""
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for parameter in parameters:
        for slot, value in parameter.slots.items():
            if isinstance(value, TensorRef) and parameter.dtype is not None:
                found[slot, parameter.dtype][value.dtype].append(parameter.name)
    for (slot, _), names in found.items():
        usual, *others = sorted(names, key=lambda dtype: -len(names[dtype]))
        for dtype in others:
            other = f"{dtype} for {listed(names[dtype], 4)}"
            what = f"slot {slot} is {usual} for {count(len(names[usual]), 'parameter')}, but {other}"
            yield Finding.warning("dtype", what, where="optimizer")


def _about_order(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Compare `param_names` with the order of the state dict, unless the state dict is sorted by name."""
    places = {name: place for place, name in enumerate(checkpoint.tensor_names())}
    if list(places) == sorted(places):
        return
    listed = [name for name in checkpoint.param_names or () if name in places]
    turned = next(((a, b) for a, b in pairwise(listed) if places[a] > places[b]), None)
    if turned is not None:
        what = f"lists {turned[0]} before {turned[1]}, but the model has them in the opposite order"
        hint = "an optimizer without parameter names is read in the order of this list"
        yield Finding.note("names", what, where="param_names", hint=hint)
