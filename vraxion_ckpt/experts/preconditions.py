"""Checks that transforms make before they change a head."""

from __future__ import annotations

from vraxion_ckpt.checkpoint.head import Head, HeadKind
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.errors import TransformError
from vraxion_ckpt.wording import count


def head_of(checkpoint: Checkpoint) -> Head:
    """Return the head of a checkpoint.

    Raises:
        TransformError: the model has no head.
    """
    if checkpoint.head is None:
        raise TransformError("the model has no head")
    return checkpoint.head


def head_of_experts(checkpoint: Checkpoint) -> Head:
    """Return the head of a checkpoint with a list of experts and a router map.

    Raises:
        TransformError: the model has no head, a single head, or no router map.
    """
    head = head_of(checkpoint)
    if head.kind is HeadKind.SINGLE:
        raise TransformError("the head is single, not a list of experts", hint="put single_to_experts before this step")
    if checkpoint.router_map is None:
        raise TransformError("the model has no router_map")
    return head


def check_expert(head: Head, expert: int, *, deleted: bool = False, hint: str | None = None) -> None:
    """Check that an expert exists.

    Args:
        head: the head.
        expert: id of the expert.
        deleted: whether a garbage-collected expert is accepted.
        hint: what the error suggests for a garbage-collected expert.

    Raises:
        TransformError: there is no such expert, or it is garbage-collected and not accepted.
    """
    if not 0 <= expert < head.num_experts:
        raise TransformError(f"there is no expert {expert}; there are {count(head.num_experts, 'expert')}")
    if expert in head.deleted and not deleted:
        raise TransformError(f"expert {expert} was deleted; it has no tensors", hint=hint)
