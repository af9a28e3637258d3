"""Split plans as files: ``mitosis_meta_v1``, and what a trainer asks for in its payload."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vraxion_ckpt.checkpoint import ring
from vraxion_ckpt.checkpoint.model import Checkpoint, SplitPlan
from vraxion_ckpt.errors import InconsistentError
from vraxion_ckpt.support import json_files

PLAN_SCHEMA = "mitosis_meta_v1"
HOW_TO_COUNT_VISITS = "count visits and plan with arc_meta:visits=FILE, or give parent= and addresses= to mitosis_split"
_ASKED_FOR = ("parent_expert", "hot_addresses")
_MEASURED = ("acc", "slope", "imbalance", "window")  # what a trainer's request says besides


def plan_as_json(plan: SplitPlan) -> dict[str, Any]:
    """Return a plan as ``mitosis_meta_v1``; the key order is fixed, ``note`` comes last and only if there is one."""
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
    """Read who is to be split and which addresses it gives up, from a plan or a trainer's ``_meta.json``.

    Raises:
        UsageError: there is no such file, or it is not a regular one.
        InconsistentError: it is no plan, it names no parent or no addresses, or it is for a ring or a number of experts
            that `checkpoint` has not.
    """
    data = json_files.load_json(path)
    if not isinstance(data, dict):
        raise InconsistentError("must be a JSON object", path=path)
    request = _request(data, path)
    if request is None:
        lacking = _lacking(data)
        message = f"is a trainer's request that {lacking}" if lacking else "has no parent_expert and hot_addresses"
        raise InconsistentError(
            message, path=path, hint=f"{HOW_TO_COUNT_VISITS}, instead of meta=" if lacking else None
        )
    router = checkpoint.router_map
    actual = {"router_map_len": len(router) if router is not None else 0, "num_experts": checkpoint.num_experts}
    for key, value in actual.items():
        if key in data and data[key] != value:
            raise InconsistentError(f"was made for {data[key]!r}, the checkpoint has {value}", path=path, key=key)
    return request


def requested_by_trainer(checkpoint: Checkpoint) -> tuple[int, tuple[int, ...]] | None:
    """Return the split that a trainer asks for under the payload's ``mitosis``, if it names parent and addresses.

    After a split the same key records what was done, with other entries; that is no request.
    """
    wish = checkpoint.payload.get("mitosis")
    return _request(wish, None) if isinstance(wish, Mapping) else None


def lacking_in_request(checkpoint: Checkpoint) -> str | None:
    """Say what a trainer's request in the payload does not name; None if there is no request, or nothing lacks."""
    wish = checkpoint.payload.get("mitosis")
    return _lacking(wish) if isinstance(wish, Mapping) else None


def _lacking(data: Mapping[str, Any]) -> str | None:
    lacking = [key for key in _ASKED_FOR if data.get(key) is None]
    if not lacking or not any(key in data for key in (*_ASKED_FOR, *_MEASURED)):
        return None
    named = f"neither {' nor '.join(lacking)}" if len(lacking) > 1 else f"no {lacking[0]}"
    return f"names {named}: this trainer's evaluation counts no visits"


def _request(data: Mapping[str, Any], path: Path | None) -> tuple[int, tuple[int, ...]] | None:
    if any(data.get(key) is None for key in _ASKED_FOR):
        return None
    parent, addresses = data["parent_expert"], data["hot_addresses"]
    if type(parent) is not int:
        raise InconsistentError("must be a whole number", path=path, key="parent_expert")
    if not isinstance(addresses, list | tuple) or not all(type(a) is int for a in addresses):
        raise InconsistentError("must be a list of whole numbers", path=path, key="hot_addresses")
    return parent, tuple(addresses)


def plan_from_request(request: tuple[int, tuple[int, ...]], ring_len: int, num_experts: int, step: int) -> SplitPlan:
    """Make a plan of a trainer's request; its arc is the shortest that covers the addresses.

    Args:
        request: parent, and at least one address on the ring.
        ring_len: how many addresses the ring has.
        num_experts: how many experts there are before the split.
        step: the checkpoint's training step.
    """
    parent, addresses = request
    arc = ring.covering_arc(list(addresses), ring_len)
    ordered = tuple(ring.in_arc_order(list(addresses), arc))
    return SplitPlan(parent, ordered, (arc.start, arc.length), "trainer", ring_len, num_experts, step=step)
