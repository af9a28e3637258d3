"""Facts about tensors: dtype, shape, size and the range of values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vraxion_ckpt.checkpoint.model import Checkpoint, unbound_state_dict
from vraxion_ckpt.checkpoint.plain_data import as_numbers, in_pieces, named_references, size_of
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.support import progress
from vraxion_ckpt.support.json_models import Fact, Number

if TYPE_CHECKING:
    from torch import Tensor


class ValueFacts(Fact):
    """The range of a tensor's values, and the number of non-finite ones."""

    minimum: int | Number | None
    """The minimum of the finite values; null if there are none, and for complex numbers."""
    maximum: int | Number | None
    """The maximum of the finite values; null as `minimum`."""
    nans: int
    """Number of NaNs."""
    infinities: int
    """Number of infinite values."""


class TensorFacts(Fact):
    """One tensor."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    values: ValueFacts | None = None
    """Null unless values were requested."""


class TensorTree(Fact):
    """Every tensor by name."""

    model: dict[str, TensorFacts]
    """In state-dict order."""
    optimizer: dict[str, TensorFacts]
    """Slots, named ``parameter:slot``, or ``id:slot`` if the optimizer is not bound to parameter names."""
    payload: dict[str, TensorFacts]


def tensor_tree(checkpoint: Checkpoint, *, values: bool) -> TensorTree:
    """Return the facts about every tensor of a checkpoint."""
    unbound = unbound_state_dict(checkpoint)
    slots = {}
    if checkpoint.optimizer is not None:
        slots = checkpoint.optimizer.state.references()
    elif unbound is not None:
        slots = unbound.references().get("state", {})
    kinds: dict[str, dict[str, TensorRef]] = {
        "model": checkpoint.state_references(),
        "optimizer": {
            f"{name}:{slot}": value
            for name, entries in slots.items()
            for slot, value in entries.items()
            if isinstance(value, TensorRef)
        },
        "payload": dict(named_references(checkpoint.payload)),
    }
    facts: dict[str, dict[str, TensorFacts]] = {}
    with progress.progress_bar("reading", size_of(kinds) if values else 0) as advance:
        for kind, tensors in kinds.items():
            facts[kind] = {}
            for name, tensor in tensors.items():
                facts[kind][name] = tensor_facts(tensor, values=values)
                advance(tensor.nbytes)
    return TensorTree.model_validate(facts)


def tensor_facts(tensor: TensorRef, *, values: bool = False) -> TensorFacts:
    """Return the facts about a tensor, with its values if requested."""
    return TensorFacts(
        dtype=tensor.dtype,
        shape=tensor.shape,
        bytes=tensor.nbytes,
        values=value_facts(tensor.read_only_tensor()) if values else None,
    )


def value_facts(tensor: Tensor) -> ValueFacts:
    """Return the range of a tensor's values and the number of non-finite ones. The tensor is read in pieces."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        try:
            numbers = tensor.detach().numpy()
        except TypeError:  # numpy has no such dtype
            numbers = np.empty(0)
        ends = (int(numbers.min()), int(numbers.max())) if numbers.size else (None, None)
        return ValueFacts(minimum=ends[0], maximum=ends[1], nans=0, infinities=0)
    nans = infinities = 0
    low, high = float("inf"), float("-inf")
    for (part,) in in_pieces(tensor):
        piece = as_numbers(part)
        if piece is None:
            break
        nan, finite = piece.isnan(), piece.isfinite()
        nans += int(nan.sum())
        infinities += int((~finite & ~nan).sum())
        if not piece.is_complex() and bool(finite.any()):
            kept = piece[finite]
            low, high = min(low, float(kept.min())), max(high, float(kept.max()))
    some = low <= high
    return ValueFacts(minimum=low if some else None, maximum=high if some else None, nans=nans, infinities=infinities)
