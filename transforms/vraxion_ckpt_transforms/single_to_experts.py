"""Rename ``head.single.*`` to expert 0, so that the model can be split."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from vraxion_ckpt.plugin_api import (
    Checkpoint,
    Effect,
    HeadKind,
    Lifecycle,
    StatePolicy,
    Transform,
    TransformError,
    clone_expert,
    count,
    head_of,
    hookimpl,
    refuse_unhealthy,
    rename_head,
)


class SingleToExperts(Transform):
    """Turn the single head into expert 0, and clone it if more experts are wanted."""

    name: ClassVar[str] = "single_to_experts"

    experts: int = Field(1, ge=1, le=4096, description="number of experts to make; 1 only renames the head")
    route: Literal["keep", "modulo"] = Field(
        "keep", description="keep: do not change the router map (all 0); modulo: address % experts, as in a new model"
    )
    noise: float = Field(
        0.0, ge=0, le=1e6, allow_inf_nan=False, description="standard deviation of the noise added to the clones"
    )
    seed: int = Field(1337, description="seed of the noise; each tensor gets its own noise")
    optimizer: StatePolicy = Field(
        "copy", description="optimizer state of the clones: expert 0's (copy), or none (reset)"
    )
    ring_len: int | None = Field(None, ge=1, le=2**31, description="ring length, if the model has no router map")
    allow_zero: bool = Field(False, description="allow a single head whose weights are all zero")
    allow_nan: bool = Field(False, description="allow a single head with weights that are NaN or infinite")

    def effect(self) -> Effect:
        return Effect.within_noise(self.noise)

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        import torch

        head = head_of(checkpoint)
        if head.kind is HeadKind.EXPERTS:
            message = f"the head already has {count(head.num_experts, 'expert')}"
            raise TransformError(message, hint="leave this step out")
        if checkpoint.router_map is None:
            if self.ring_len is None:
                raise TransformError("the model has no router_map", hint="give its length: ring_len=N")
            checkpoint.router_map = torch.zeros(self.ring_len, dtype=torch.int64)
        elif self.ring_len not in (None, len(checkpoint.router_map)):
            raise TransformError(
                f"ring_len is {self.ring_len}, but the router_map has {count(len(checkpoint.router_map), 'address')}"
            )
        if self.experts > 1:
            refuse_unhealthy(checkpoint, 0, allow_zero=self.allow_zero, allow_nan=self.allow_nan)
        rename_head(checkpoint, HeadKind.EXPERTS)
        checkpoint.lifecycle.setdefault(0, Lifecycle.fresh(checkpoint.step))
        for child in range(1, self.experts):
            clone_expert(checkpoint, 0, child, noise=self.noise, seed=self.seed, optimizer=self.optimizer)
        router = checkpoint.router_map
        if self.route == "modulo" and router is not None:
            if self.experts - 1 > torch.iinfo(router.dtype).max:
                raise TransformError(f"the router_map's {router.dtype} cannot hold expert id {self.experts - 1}")
            owners = torch.arange(len(router), dtype=torch.int64) % self.experts
            checkpoint.router_map = owners.to(router.dtype)
        return checkpoint


@hookimpl
def register_transforms() -> list[type[Transform]]:
    """Register the transform."""
    return [SingleToExperts]
