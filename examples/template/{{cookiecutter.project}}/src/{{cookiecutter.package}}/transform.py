"""Multiply the weights of one expert."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from vraxion_ckpt.plugin_api import (
    Checkpoint,
    Effect,
    Expert,
    Transform,
    TransformError,
    hookimpl,
)


class ExpertTransform(Transform):
    """Multiply the weights of one expert."""

    name: ClassVar[str] = "{{ cookiecutter.transform }}"

    expert: int = Field(description="expert to change")
    factor: float = Field(1.0, allow_inf_nan=False, description="factor for its weights")

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        if checkpoint.head is None or self.expert not in checkpoint.head.experts:
            raise TransformError(f"there is no expert {self.expert}", key=self.name)
        old = checkpoint.head.experts[self.expert]
        # Make new tensors. A transform must not write into the tensors that it gets.
        new = {
            leaf: (tensor.double() * self.factor).to(tensor.dtype) if tensor.is_floating_point() else tensor
            for leaf, tensor in old.items()
        }
        checkpoint.head.experts[self.expert] = Expert(new)
        return checkpoint

    def effect(self) -> Effect:
        return Effect.changed()


@hookimpl
def register_transforms() -> list[type[Transform]]:
    """Register the transform."""
    return [ExpertTransform]
