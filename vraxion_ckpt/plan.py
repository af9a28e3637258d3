"""Split plans as files: ``mitosis_meta_v1``, and what a trainer asks for in its payload."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vraxion_ckpt import jsonfile, ring
from vraxion_ckpt.errors import InconsistentError
from vraxion_ckpt.model import Checkpoint, SplitPlan

SCHEMA = "mitosis_meta_v1"


def to_json(plan: SplitPlan) -> dict[str, Any]:
    """Return a plan as ``mitosis_meta_v1``; the key order is fixed."""
    start, length = plan.arc
    return {
        "schema_version": SCHEMA,
        "parent_expert": plan.parent,
        "router_map_len": plan.router_map_len,
        "num_experts": plan.num_experts,
        "address_policy": plan.policy,
        "hot_arc": {"start": start, "len": length},
        "hot_addresses": list(plan.addresses),
        "metrics": dict(plan.metrics),
    }


def load(path: Path, checkpoint: Checkpoint) -> tuple[int, tuple[int, ...]]:
    """Read who is to be split and which addresses it gives up, from a plan or a trainer's ``_meta.json``.

    Raises:
        UsageError: there is no such file, or it is not a regular one.
        InconsistentError: it is no plan, or one for a ring or a number of experts that `checkpoint` has not.
    """
    data = jsonfile.load(path)
    if not isinstance(data, dict):
        raise InconsistentError("must be a JSON object", path=path)
    request = _request(data, path)
    if request is None:
        raise InconsistentError("has no parent_expert and hot_addresses", path=path)
    router = checkpoint.router_map
    actual = {"router_map_len": len(router) if router is not None else 0, "num_experts": checkpoint.num_experts}
    for key, value in actual.items():
        if key in data and data[key] != value:
            raise InconsistentError(f"was made for {data[key]!r}, the checkpoint has {value}", path=path, key=key)
    return request


def requested_by_trainer(checkpoint: Checkpoint) -> tuple[int, tuple[int, ...]] | None:
    """Return the split that a trainer asks for under the payload's ``mitosis``, if it does.

    After a split the same key records what was done, with other entries; that is no request.
    """
    wish = checkpoint.payload.get("mitosis")
    return _request(wish, None) if isinstance(wish, Mapping) else None


def _request(data: Mapping[str, Any], path: Path | None) -> tuple[int, tuple[int, ...]] | None:
    if data.get("parent_expert") is None or "hot_addresses" not in data:
        return None  # a trainer that has found no parent says None
    parent, addresses = data["parent_expert"], data["hot_addresses"]
    if type(parent) is not int:
        raise InconsistentError("must be a whole number", path=path, key="parent_expert")
    if not isinstance(addresses, list | tuple) or not all(type(a) is int for a in addresses):
        raise InconsistentError("must be a list of whole numbers", path=path, key="hot_addresses")
    return parent, tuple(addresses)


def from_request(request: tuple[int, tuple[int, ...]], ring_len: int, num_experts: int, step: int) -> SplitPlan:
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
