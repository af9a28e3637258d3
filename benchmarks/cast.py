"""A transform that changes every tensor of a checkpoint, written as the author of a plugin would write it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from vraxion_ckpt.plugin_api import Checkpoint, Effect, Expert, TensorRef, Transform


class Cast(Transform):
    """Store all floating-point tensors as bfloat16."""

    name: ClassVar[str] = "cast"

    def effect(self) -> Effect:
        return Effect.changed()

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        for name, tensor in checkpoint.core.references().items():
            checkpoint.core[name] = _narrow(tensor)
        if checkpoint.head is not None:
            experts = checkpoint.head.experts
            for number, expert in experts.items():
                experts[number] = Expert({leaf: _narrow(tensor) for leaf, tensor in expert.references().items()})
        if checkpoint.optimizer is not None:
            state = checkpoint.optimizer.state
            for name, slots in state.references().items():
                state[name] = {slot: _narrow(value) for slot, value in slots.items()}
        return checkpoint


def _narrow(value: Any) -> Any:
    """Return a floating-point tensor that is converted when it is written. Return anything else unchanged."""
    if isinstance(value, TensorRef) and value.is_floating_point():
        return value.mapped(torch.Tensor.bfloat16, dtype="bfloat16")
    return value
