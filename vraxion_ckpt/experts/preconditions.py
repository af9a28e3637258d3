"""Checks that transforms make before they change a head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

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


def put_record(checkpoint: Checkpoint, key: str, record: dict[str, Any], known: Collection[str]) -> None:
    """Put a transform's record into the payload, in place of an earlier one.

    Args:
        checkpoint: the checkpoint. Its payload is changed.
        key: the key of the record.
        record: the record.
        known: keys of earlier records and of requests. A value without any of them belongs to somebody else.

    Raises:
        TransformError: the payload has another value under this key.
    """
    value = checkpoint.payload.get(key)
    if value is not None and not (isinstance(value, Mapping) and any(each in value for each in known)):
        message = f"the payload has a value of somebody else under the key `{key}`, which the record would replace"
        raise TransformError(message, key=key, hint=f"leave it out, as in --drop-key {key}")
    checkpoint.payload[key] = record


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
