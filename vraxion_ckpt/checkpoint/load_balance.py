"""Load balance: how evenly ring visits are distributed over the experts, as trainers log it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vraxion_ckpt.checkpoint.ring import Ints, Weights, total_by_owner


@dataclass(frozen=True)
class Balance:
    """The load of the experts.

    Attributes:
        shares: each expert's fraction of all visits, by id.
        max_share: the largest share. Trainers log it as ``ptr_expert_max_share``.
        entropy: normalised entropy −Σ p·log p / log N of the shares: 1 if all N are equal, 0 if one expert has all
            visits, 0 for a single expert. Trainers log it as ``ptr_expert_entropy``.
        active: number of experts with at least one visit.
    """

    shares: tuple[float, ...]
    max_share: float
    entropy: float
    active: int


def balance(visits: Weights, owners: Ints, num_experts: int) -> Balance:
    """Return the load of the experts. Visits to addresses without an owner are ignored.

    Args:
        visits: number of visits to each address, ≥ 0, shape ``[L]``.
        owners: id of the expert that owns each address, shape ``[L]``.
        num_experts: number of experts.
    """
    totals = np.asarray(total_by_owner(visits, owners, num_experts), dtype=np.float64)
    shares = totals / (totals.sum() or 1.0)
    visited = shares[shares > 0]
    entropy = float(-(visited * np.log(visited)).sum() / np.log(num_experts)) if num_experts > 1 else 0.0
    return Balance(tuple(shares.tolist()), float(shares.max(initial=0.0)), abs(entropy), len(visited))


@dataclass(frozen=True)
class ExpertLoads:
    """The load before a split, the predicted load after it, and the measured load after it. Each is None if unknown."""

    before: Balance | None = None
    predicted: Balance | None = None
    measured: Balance | None = None


def compare_loads(
    visits: Weights | None, visits_after: Weights | None, old: tuple[Ints, int] | None, new: tuple[Ints, int]
) -> ExpertLoads:
    """Return the load before a split, the predicted load after it, and the measured load after it.

    Args:
        visits: visits counted before the split, shape ``[L]``, or None.
        visits_after: visits counted after training resumed, shape ``[L]``, or None.
        old: router map and number of experts before the split, or None.
        new: router map and number of experts after the split.
    """
    return ExpertLoads(
        before=balance(visits, *old) if visits is not None and old is not None else None,
        predicted=balance(visits, *new) if visits is not None else None,
        measured=balance(visits_after, *new) if visits_after is not None else None,
    )
