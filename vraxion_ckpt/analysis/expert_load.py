"""The load of the experts: before a split, predicted after it, and measured after training was resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from vraxion_ckpt.checkpoint.invariants import router_owners
from vraxion_ckpt.checkpoint.load_balance import ExpertLoads, balance, compare_loads
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.ring import Ints, as_addresses
from vraxion_ckpt.checkpoint.visits import load_visits
from vraxion_ckpt.errors import UsageError
from vraxion_ckpt.reading.opening import PathLike, read_unbound
from vraxion_ckpt.reading.read_options import ReadOptions


def expert_loads(
    checkpoint: Checkpoint,
    *,
    against: PathLike | Checkpoint | None = None,
    visits_file: PathLike | None = None,
    visits_after: PathLike | None = None,
) -> ExpertLoads | None:
    """Compare the load of the experts before a split, the predicted load and the measured load.

    If the checkpoint has a planned split, or no recorded one, its own router map is the state before the split, and
    the plan gives the prediction.

    Args:
        checkpoint: a checkpoint after or before a split.
        against: the checkpoint before the split. If None, it is derived from the last split that the payload records.
        visits_file: visits counted before the split.
        visits_after: visits counted after training was resumed.

    Returns:
        The loads, or None if no visits are given.

    Raises:
        UsageError: the checkpoint has no ring, or `against` has none of the same length.
    """
    if visits_file is None and visits_after is None:
        return None
    router = checkpoint.router_reference
    if router is None or checkpoint.head is None:
        raise UsageError("has no ring of experts to count visits on", path=checkpoint.origin.path)
    owners = router_owners(router)
    planned = _split_planned(checkpoint, owners)
    # If the next split is planned already, the last split recorded in the payload is not the one to show.
    old = _split_undone(checkpoint, owners) if planned is None else None
    if against is not None:
        former = against if isinstance(against, Checkpoint) else read_unbound(against, ReadOptions())
        theirs = former.router_reference
        if former.head is None or theirs is None or theirs.numel() != len(owners):
            raise UsageError("has no ring of the same length", path=former.origin.path)
        old = router_owners(theirs), former.num_experts
        if planned is not None and former.num_experts == checkpoint.num_experts and np.array_equal(old[0], owners):
            old = None  # no address has moved; the plan gives the prediction
    before, after = (
        load_visits(Path(file), len(owners)).visits if file is not None else None
        for file in (visits_file, visits_after)
    )
    now = owners, checkpoint.num_experts
    if old is not None:
        return compare_loads(before, after, old, now)
    found = compare_loads(before, after, now, now)
    predicted = balance(before, *planned) if before is not None and planned is not None else None
    return replace(found, predicted=predicted)


def _split_planned(checkpoint: Checkpoint, owners: Ints) -> tuple[Ints, int] | None:
    """Return the router map and the number of experts after the planned split."""
    addresses = as_addresses(checkpoint.plan.addresses, len(owners)) if checkpoint.plan is not None else None
    if addresses is None:
        return None
    future = owners.copy()
    future[addresses] = checkpoint.num_experts
    return future, checkpoint.num_experts + 1


def _split_undone(checkpoint: Checkpoint, owners: Ints) -> tuple[Ints, int] | None:
    """Return the router map and the number of experts before the recorded split, or None if it does not apply."""
    done = checkpoint.payload.get("mitosis")
    if not isinstance(done, Mapping) or not {"parent", "child", "addresses"} <= done.keys():
        return None
    parent, child, addresses = done["parent"], done["child"], done["addresses"]
    if not isinstance(addresses, list | tuple) or not set(map(type, addresses)) <= {int}:
        return None
    moved = as_addresses(addresses, len(owners))
    if type(parent) is not int or not 0 <= parent < child or child != checkpoint.num_experts - 1:
        return None
    if moved is None or not np.array_equal(np.sort(moved), np.flatnonzero(owners == child)):
        return None  # addresses have moved since
    former = owners.copy()
    former[moved] = parent
    return former, child
