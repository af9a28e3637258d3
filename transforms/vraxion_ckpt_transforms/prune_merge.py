"""Remove an expert and give its addresses to another expert. The model shrinks by one expert."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from vraxion_ckpt.plugin_api import (
    Checkpoint,
    Effect,
    Head,
    Transform,
    TransformError,
    check_expert,
    head_of_experts,
    hookimpl,
    put_record,
    refuse_unhealthy,
    remove_expert,
    router_owners,
)


class PruneMerge(Transform):
    """Remove an expert, and give its addresses to another expert."""

    name: ClassVar[str] = "prune_merge"

    merge_from: int | None = Field(None, ge=0, description="expert to remove; the one with the highest id if not given")
    merge_into: int = Field(ge=0, description="expert that takes over the addresses")
    renumber: bool = Field(False, description="allow removing an expert that is not last; higher ids move down by one")
    allow_tenured: bool = Field(False, description="allow removing a tenured expert")
    allow_zero: bool = Field(False, description="allow an expert merge_into whose weights are all zero")
    allow_nan: bool = Field(False, description="allow an expert merge_into with weights that are NaN or infinite")

    def effect(self) -> Effect:
        return Effect.changed()

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        head = head_of_experts(checkpoint)
        removed = head.num_experts - 1 if self.merge_from is None else self.merge_from
        self._check(removed, checkpoint, head)
        router = checkpoint.router_map
        if router is not None and (router_owners(router) == removed).any():
            refuse_unhealthy(checkpoint, self.merge_into, allow_zero=self.allow_zero, allow_nan=self.allow_nan)
        remove_expert(checkpoint, removed, self.merge_into)
        record = {
            "merge_from": removed,
            "merge_into": self.merge_into,
            "router_remap": f"{removed}->{self.merge_into}",
        }
        put_record(checkpoint, "prune", record, known=("merge_from",))
        return checkpoint

    def _check(self, removed: int, checkpoint: Checkpoint, head: Head) -> None:
        last = head.num_experts - 1
        if not last:
            raise TransformError("the only expert cannot be removed", hint="experts_to_single makes it a single head")
        check_expert(head, removed, deleted=True)
        if removed == self.merge_into:
            raise TransformError(f"merge_from and merge_into are both {removed}", hint="pass another merge_from=")
        check_expert(head, self.merge_into, hint="pass another merge_into=")
        row = checkpoint.lifecycle.get(removed)
        if row is not None and row.tenured and not self.allow_tenured:
            raise TransformError(f"expert {removed} is tenured", hint="pass allow_tenured=true")
        if removed != last and not self.renumber:
            raise TransformError(
                f"expert {removed} is not the last; the ids above it, up to {last}, would move down by one",
                hint="pass renumber=true",
            )


@hookimpl
def register_transforms() -> list[type[Transform]]:
    """Register the transform."""
    return [PruneMerge]
