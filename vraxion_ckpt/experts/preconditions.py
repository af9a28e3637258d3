"""What a transform needs of a head before it changes it."""

from __future__ import annotations

from vraxion_ckpt.checkpoint.head import Head, HeadKind
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.errors import TransformError


def head_of(checkpoint: Checkpoint) -> Head:
    """Return the head of a checkpoint, or raise `TransformError`."""
    if checkpoint.head is None:
        raise TransformError("the model has no head")
    return checkpoint.head


def head_of_experts(checkpoint: Checkpoint) -> Head:
    """Return a head that is a list of experts with a router map, or raise `TransformError`."""
    head = head_of(checkpoint)
    if head.kind is HeadKind.SINGLE:
        raise TransformError("the head is single (head.single.*)", hint="put single_to_experts before this step")
    if checkpoint.router_map is None:
        raise TransformError("the model has no router_map")
    return head


def check_expert(head: Head, expert: int, *, deleted: bool = False, hint: str | None = None) -> None:
    """Raise `TransformError` for an expert that a head does not have, or, unless it may be, one that was deleted."""
    if not 0 <= expert < head.num_experts:
        raise TransformError(f"there is no expert {expert}; there are {head.num_experts}")
    if expert in head.deleted and not deleted:
        raise TransformError(f"expert {expert} was deleted; it has no tensors", hint=hint)
