"""Give addresses of the ring to another existing expert, to balance load without adding an expert."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from vraxion_ckpt.plugin_api import (
    Checkpoint,
    Effect,
    IntList,
    Transform,
    TransformError,
    hookimpl,
)


class HandOver(Transform):
    """Give addresses of the ring to another expert."""

    name: ClassVar[str] = "hand_over"

    addresses: IntList = Field(description="addresses to give away, like [1,3,8-15]")
    to: int = Field(ge=0, description="expert that becomes their owner")

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        head, router = checkpoint.head, checkpoint.router_map
        if head is None or router is None:
            raise TransformError("the model has no experts or no router_map", key=self.name)
        if self.to not in head.experts:
            raise TransformError(f"there is no expert {self.to} with tensors", key=self.name)
        if not self.addresses or not all(0 <= address < len(router) for address in self.addresses):
            raise TransformError(
                f"addresses must be in the range 0 to {len(router) - 1}, and at least one", key=self.name
            )
        moved = router.to(torch.int64, copy=True)  # a transform must not write into the tensors that it gets
        moved[torch.tensor(self.addresses)] = self.to
        checkpoint.router_map = moved.to(router.dtype)
        checkpoint.plan = None  # it was made for the old router map
        return checkpoint

    def effect(self) -> Effect:
        return Effect.changed()


@hookimpl
def register_transforms() -> list[type[Transform]]:
    """Register the transform."""
    return [HandOver]
