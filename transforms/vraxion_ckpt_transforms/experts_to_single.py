"""Turn bit-identical experts into ``head.single.*``. This is the inverse of `single_to_experts`."""

from __future__ import annotations

import warnings
from typing import ClassVar

from pydantic import Field

from vraxion_ckpt.plugin_api import (
    Checkpoint,
    CkptWarning,
    Effect,
    Head,
    HeadKind,
    Optimizer,
    OptimizerForm,
    ParamGroup,
    Transform,
    TransformError,
    differences,
    head_of,
    hookimpl,
    refuse_unhealthy,
    remove_expert,
    rename_head,
    router_owners,
    same_bits,
)

_HOW_TO_REMOVE = "remove it first with prune_merge, which lets another expert take over its addresses"


class ExpertsToSingle(Transform):
    """Turn the only expert, or several bit-identical experts, into a single head."""

    name: ClassVar[str] = "experts_to_single"

    allow_zero: bool = Field(False, description="allow experts whose weights are all zero")
    allow_nan: bool = Field(False, description="allow experts with weights that are NaN or infinite")

    def effect(self) -> Effect:
        return Effect.exact()

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        head = self._head(checkpoint)
        for other in sorted(head.experts.keys() - {0}):
            self._check_tensors(other, head)
            if checkpoint.optimizer is not None:
                self._check_optimizer(other, head, checkpoint.optimizer)
        router = checkpoint.router_map
        if router is not None and router_owners(router).any():  # expert 0 takes over the addresses of the others
            refuse_unhealthy(checkpoint, 0, allow_zero=self.allow_zero, allow_nan=self.allow_nan)
        inner = next((leaf for leaf in head.experts[0] if "." in leaf), None)
        if inner is not None:
            message = f"no VRAXION runtime can load a single head with inner layers ({inner})"
            warnings.warn(message, CkptWarning, stacklevel=2)
        for other in range(head.num_experts - 1, 0, -1):
            remove_expert(checkpoint, other, into=0)
        rename_head(checkpoint, HeadKind.SINGLE)
        checkpoint.plan = None
        return checkpoint

    def _head(self, checkpoint: Checkpoint) -> Head:
        head = head_of(checkpoint)
        if head.kind is HeadKind.SINGLE:
            raise TransformError("the head is single already", hint="leave this step out")
        if head.deleted:
            raise TransformError(
                f"expert {min(head.deleted)} was deleted, so it cannot be compared with the others",
                hint=_HOW_TO_REMOVE,
            )
        return head

    def _check_tensors(self, other: int, head: Head) -> None:
        first, second = head.experts[0], head.experts[other]
        for leaf in dict.fromkeys([*first, *second]):
            if leaf not in first or leaf not in second or not same_bits(first[leaf], second[leaf]):
                raise TransformError(
                    f"experts 0 and {other} differ in {leaf}; only identical experts can become one head",
                    hint=_HOW_TO_REMOVE,
                )

    def _check_optimizer(self, other: int, head: Head, optimizer: Optimizer) -> None:
        """Raise TransformError if the optimizer state or the param group of experts 0 and `other` differs."""
        groups = {name: group for group in optimizer.groups for name in group.params}
        for leaf in head.experts[other]:
            kept, lost = head.prefix(0) + leaf, head.prefix(other) + leaf
            if lost in optimizer.state and any(differences(optimizer.state.get(kept), optimizer.state[lost])):
                what = "state"
            elif lost in groups and not self._are_alike(optimizer, groups[lost], groups.get(kept)):
                what = "param group"
            else:
                continue
            raise TransformError(
                f"experts 0 and {other} are identical, but the optimizer's {what} for {leaf} is not",
                hint=_HOW_TO_REMOVE,
            )

    @staticmethod
    def _are_alike(optimizer: Optimizer, lost: ParamGroup, kept: ParamGroup | None) -> bool:
        """Return whether two param groups are the same, as far as a file with options for each parameter shows it."""
        if kept is None or lost is kept:
            return lost is kept
        is_flat = optimizer.parts[lost.part].form is OptimizerForm.FLATTENED
        return is_flat and lost.part == kept.part and not any(differences(lost.options, kept.options))


@hookimpl
def register_transforms() -> list[type[Transform]]:
    """Register the transform."""
    return [ExpertsToSingle]
