"""Split plans in files (``mitosis_meta_v1``), and split requests of trainers in the payload."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vraxion_ckpt.checkpoint import ring
from vraxion_ckpt.checkpoint.model import Checkpoint, SplitPlan
from vraxion_ckpt.errors import InconsistentError
from vraxion_ckpt.support import json_files

PLAN_SCHEMA = "mitosis_meta_v1"
HOW_TO_COUNT_VISITS = (
    "count visits and make a plan with arc_meta:visits=FILE, or pass parent= and addresses= to mitosis_split"
)
_REQUIRED = ("parent_expert", "hot_addresses")
_MEASURED = ("acc", "slope", "imbalance", "window")  # further entries of a trainer's request


def plan_as_json(plan: SplitPlan) -> dict[str, Any]:
    """Return a plan as ``mitosis_meta_v1``, with fixed key order. ``note`` is last, and left out if it is empty."""
    start, length = plan.arc
    return {
        "schema_version": PLAN_SCHEMA,
        "parent_expert": plan.parent,
        "router_map_len": plan.router_map_len,
        "num_experts": plan.num_experts,
        "address_policy": plan.policy,
        "hot_arc": {"start": start, "len": length},
        "hot_addresses": list(plan.addresses),
        "metrics": dict(plan.metrics),
        **({"note": plan.note} if plan.note else {}),
    }


def load_plan(path: Path, checkpoint: Checkpoint) -> tuple[int, tuple[int, ...]]:
    """Read the parent expert and the addresses of a split from a plan or a trainer's ``_meta.json``.

    Returns:
        the id of the parent, and the addresses that move to the child.

    Raises:
        UsageError: the file does not exist or is not a regular file.
        CorruptError: the file is not JSON.
        InconsistentError: the file is not a plan, lacks the parent or the addresses, or was made for another ring
            length or number of experts.
    """
    data = json_files.load_json(path)
    if not isinstance(data, dict):
        raise InconsistentError("must be a JSON object", path=path)
    request = _request(data, path)
    if request is None:
        lacking = _lacking(data)
        message = f"is a trainer's request that {lacking}" if lacking else "lacks parent_expert or hot_addresses"
        raise InconsistentError(
            message, path=path, hint=f"{HOW_TO_COUNT_VISITS}, instead of meta=" if lacking else None
        )
    router = checkpoint.router_reference
    actual = {"router_map_len": router.numel() if router is not None else 0, "num_experts": checkpoint.num_experts}
    for key, value in actual.items():
        if key in data and data[key] != value:
            raise InconsistentError(f"is {data[key]!r} in the plan, but {value} in the checkpoint", path=path, key=key)
    return request


def requested_by_trainer(checkpoint: Checkpoint) -> tuple[int, tuple[int, ...]] | None:
    """Return parent and addresses of the split that a trainer requests in the payload's ``mitosis``, or None.

    After a split, the same key records the split that was done. Such a record is not a request.

    Raises:
        InconsistentError: parent or addresses have wrong types.
    """
    request = checkpoint.payload.get("mitosis")
    return _request(request, None) if isinstance(request, Mapping) else None


def lacking_in_request(checkpoint: Checkpoint) -> str | None:
    """Describe what is missing in the trainer's split request. None if there is no request, or nothing is missing."""
    request = checkpoint.payload.get("mitosis")
    return _lacking(request) if isinstance(request, Mapping) else None


def _lacking(data: Mapping[str, Any]) -> str | None:
    lacking = [key for key in _REQUIRED if data.get(key) is None]
    if not lacking or not any(key in data for key in (*_REQUIRED, *_MEASURED)):
        return None
    named = f"neither {' nor '.join(lacking)}" if len(lacking) > 1 else f"no {lacking[0]}"
    return f"names {named}, because this trainer's evaluation does not count visits"


def _request(data: Mapping[str, Any], path: Path | None) -> tuple[int, tuple[int, ...]] | None:
    if any(data.get(key) is None for key in _REQUIRED):
        return None
    parent, addresses = data["parent_expert"], data["hot_addresses"]
    if type(parent) is not int:
        raise InconsistentError("must be an integer", path=path, key="parent_expert")
    if not isinstance(addresses, list | tuple) or not set(map(type, addresses)) <= {int}:
        raise InconsistentError("must be a list of integers", path=path, key="hot_addresses")
    return parent, tuple(addresses)


def plan_from_request(request: tuple[int, tuple[int, ...]], ring_len: int, num_experts: int, step: int) -> SplitPlan:
    """Return a plan for a trainer's request. Its arc is the shortest that contains the addresses.

    Args:
        request: id of the parent, and at least one address on the ring.
        ring_len: number of ring addresses.
        num_experts: number of experts before the split.
        step: training step of the checkpoint.
    """
    parent, addresses = request
    arc = ring.covering_arc(addresses, ring_len)
    ordered = tuple(ring.in_arc_order(addresses, arc))
    return SplitPlan(parent, ordered, (arc.start, arc.length), "trainer", ring_len, num_experts, step=step)
