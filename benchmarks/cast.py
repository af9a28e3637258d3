"""A transform that changes every tensor of a checkpoint, written as the author of a plugin would write it."""

from __future__ import annotations

from typing import ClassVar

import torch

from vraxion_ckpt.plugin_api import Checkpoint, Effect, Expert, Transform


class Cast(Transform):
    """Store all floating-point tensors as bfloat16."""

    name: ClassVar[str] = "cast"

    def effect(self) -> Effect:
        return Effect.changed()

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        for name in checkpoint.core:
            checkpoint.core[name] = _narrow(checkpoint.core[name])
        if checkpoint.head is not None:
            experts = checkpoint.head.experts
            for number, expert in experts.items():
                experts[number] = Expert({leaf: _narrow(tensor) for leaf, tensor in expert.items()})
        if checkpoint.optimizer is not None:
            for slots in checkpoint.optimizer.state.values():
                for slot, value in slots.items():
                    slots[slot] = _narrow(value) if isinstance(value, torch.Tensor) else value
        return checkpoint


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
