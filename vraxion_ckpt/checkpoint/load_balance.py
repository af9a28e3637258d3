"""How evenly visits fall on the experts: the signs of life of a refinement loop, as VRAXION's trainers log them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vraxion_ckpt.checkpoint.ring import Ints, Weights, total_by_owner


@dataclass(frozen=True)
class Balance:
    """The load of the experts.

    Attributes:
        shares: the part of all visits that fell on each expert, by id.
        max_share: the largest of them; the trainers' ``ptr_expert_max_share``.
        entropy: −Σ p·log p over log N: 1 if all N experts have the same share, 0 if one has all; the trainers'
            ``ptr_expert_entropy``. 0 for a single expert.
        active: how many experts were visited at all.
    """

    shares: tuple[float, ...]
    max_share: float
    entropy: float
    active: int


def balance(visits: Weights, owners: Ints, num_experts: int) -> Balance:
    """Return the load of each expert; visits of addresses that no expert owns count for none.

    Args:
        visits: how often the pointer stood at each address, ≥ 0, shape ``[L]``.
        owners: the expert of each address, shape ``[L]``.
        num_experts: how many experts there are.
    """
    totals = np.asarray(total_by_owner(visits, owners, num_experts), dtype=np.float64)
    shares = totals / (totals.sum() or 1.0)
    visited = shares[shares > 0]
    entropy = float(-(visited * np.log(visited)).sum() / np.log(num_experts)) if num_experts > 1 else 0.0
    return Balance(tuple(shares.tolist()), float(shares.max(initial=0.0)), abs(entropy), len(visited))


@dataclass(frozen=True)
class ExpertLoads:
    """The load before a split, as it predicts it, and as it was measured after a resume."""

    before: Balance | None = None
    predicted: Balance | None = None
    measured: Balance | None = None


def compare_loads(
    visits: Weights | None, visits_after: Weights | None, old: tuple[Ints, int] | None, new: tuple[Ints, int]
) -> ExpertLoads:
    """Compare the load before a split, predicted and measured.

    Args:
        visits: counted before the split.
        visits_after: counted after training was resumed.
        old: the router map before the split and the number of experts, where that is known.
        new: those after it.
    """
    return ExpertLoads(
        before=balance(visits, *old) if visits is not None and old is not None else None,
        predicted=balance(visits, *new) if visits is not None else None,
        measured=balance(visits_after, *new) if visits_after is not None else None,
    )
