"""Arcs, windows and owners on a ring of addresses: plain numpy, no torch.

A ring has `L` addresses, 0 … L−1, and the one after the last is the first. An arc is a run of neighbouring
addresses, given by its start and length; it may wrap. `owners` is the router map: the expert of each address.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.int64] | NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Visits:
    """What was seen at each address of a ring, shape ``[L]`` each.

    Attributes:
        visits: how often the pointer stood there; finite, ≥ 0.
        loss_sum: the loss summed over those visits, where it was recorded.
        note: what the counts depend on beside the checkpoint, for people: settings, an input, a seed.
    """

    visits: Weights
    loss_sum: Weights | None = None
    note: str = ""


@dataclass(frozen=True)
class Arc:
    """A run of neighbouring addresses on a ring of `ring_len`; it may wrap."""

    start: int
    length: int
    ring_len: int

    @property
    def addresses(self) -> Ints:
        """The addresses in arc order."""
        return (self.start + np.arange(self.length, dtype=np.int64)) % self.ring_len


def as_weights(values: Any) -> Weights:
    """Return `values` as int64 where every one is a whole number that fits, as float64 otherwise.

    Whole numbers are summed exactly and written as whole numbers.

    Raises:
        ValueError: the values are not one flat list of finite numbers ≥ 0 that are not all zero.
    """
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise ValueError("must be one flat list of numbers")
    if not np.isfinite(array).all():
        raise ValueError(f"value {int(np.argmin(np.isfinite(array)))} is not finite")
    if array.size and array.min() < 0:
        raise ValueError(f"value {int(np.argmin(array))} is negative")
    if not array.any():
        raise ValueError("all values are zero")
    with np.errstate(over="ignore"):
        total = float(array.astype(np.float64).sum())
    if not np.isfinite(total):
        raise ValueError("their sum is too large")
    whole = array.dtype.kind in "iu" or bool((array == np.floor(array)).all())
    if whole and total < 2**62:
        return array.astype(np.int64)
    return array.astype(np.float64)


def exact_sum(weights: Weights) -> int | float:
    """Sum without rounding: whole numbers as an int, others rounded once at the end."""
    if weights.dtype.kind == "i":
        return int(weights.sum())
    return math.fsum(weights.tolist())


def total_by_owner(weights: Weights, owners: Ints, num_experts: int) -> list[int | float]:
    """Sum the weights of the addresses of each expert; addresses of no valid expert count for none."""
    valid = (owners >= 0) & (owners < num_experts)
    if weights.dtype.kind == "i":
        sums = np.zeros(num_experts, dtype=np.int64)
        np.add.at(sums, owners[valid], weights[valid])
        return [int(value) for value in sums]
    order = np.argsort(owners[valid], kind="stable")
    edges = np.searchsorted(owners[valid][order], np.arange(num_experts + 1))
    grouped = weights[valid][order]
    return [exact_sum(grouped[start:end]) for start, end in pairwise(edges.tolist())]


def auto_arc_length(ring_len: int, num_experts: int) -> int:
    """Return ``max(16, L // (2 · experts))``, clamped to the ring: half of an expert's fair share."""
    return max(1, min(ring_len, max(16, ring_len // (2 * max(1, num_experts)))))


def hottest_arc(weights: Weights, length: int) -> tuple[Arc, int | float]:
    """Find the arc of `length` addresses with the largest sum; ties go to the smallest start.

    One pass of prefix sums, O(L). Whole numbers are exact in 64 bits. Other numbers are first summed in floating
    point with a bound on its error; where more than one arc lies within that bound, those are compared
    exactly, as fractions, so that a tie is a tie.

    Args:
        weights: one weight an address, ≥ 0, shape ``[L]``.
        length: 1 … L.
    """
    ring_len = len(weights)
    if not 1 <= length <= ring_len:
        raise ValueError(f"arc length {length} is not in 1 … {ring_len}")
    sums = _window_sums(weights, length)
    start = int(np.argmax(sums))
    if weights.dtype.kind == "f":
        # Each of the 2L additions of a prefix sum rounds by at most half an ulp of the total.
        error = 4 * ring_len * np.finfo(np.float64).eps * float(weights.sum())
        rivals = np.flatnonzero(sums >= sums[start] - 2 * error)
        if len(rivals) > 1:
            start = _exact_argmax(weights, length, rivals)
    arc = Arc(start, length, ring_len)
    return arc, exact_sum(weights[arc.addresses])


def _window_sums(weights: Weights, length: int) -> Weights:
    prefix = np.concatenate([weights[:1] * 0, weights, weights[: length - 1]]).cumsum()
    sums: Weights = prefix[length:] - prefix[:-length]
    return sums


def _exact_argmax(weights: Weights, length: int, starts: Ints) -> int:
    """Return the first of `starts` whose window has the largest exact sum."""
    # Every float is an integer over a power of two: over the common denominator, sums of them are exact.
    ratios = [value.as_integer_ratio() for value in weights.tolist()]
    common = max(denominator for _, denominator in ratios)
    whole = [numerator * (common // denominator) for numerator, denominator in ratios]
    ring_len = len(whole)
    prefix = [0]
    for value in whole + whole[: length - 1]:
        prefix.append(prefix[-1] + value)
    return max((int(s) % ring_len for s in starts), key=lambda s: (prefix[s + length] - prefix[s], -s))


def covering_arc(addresses: list[int], ring_len: int) -> Arc:
    """Return the shortest arc that covers all `addresses`; of several, the one with the smallest start."""
    points = sorted(set(addresses))
    gaps = [b - a for a, b in pairwise([*points, points[0] + ring_len])]
    # The arc starts after its widest gap and ends before it.
    best = max(range(len(points)), key=lambda i: (gaps[i], -points[(i + 1) % len(points)]))
    return Arc(points[(best + 1) % len(points)], ring_len - gaps[best] + 1, ring_len)


def in_arc_order(addresses: list[int], arc: Arc) -> list[int]:
    """Sort addresses by their distance from the arc's start, going round the ring."""
    return sorted(addresses, key=lambda address: (address - arc.start) % arc.ring_len)


def _runs(owners: Ints) -> list[tuple[int, int, int]]:
    """Return the ring as arcs of one owner each: (start, length, owner), from address 0 on, without wrapping."""
    edges = np.flatnonzero(np.diff(owners)) + 1
    starts = [0, *edges.tolist()]
    ends = [*edges.tolist(), len(owners)]
    return [(s, e - s, int(owners[s])) for s, e in zip(starts, ends, strict=True)]


def arcs(owners: Ints) -> list[tuple[int, int, int]]:
    """Return the ring as arcs of one owner each: (start, length, owner); the last one may wrap."""
    found = _runs(owners)
    if len(found) > 1 and found[0][2] == found[-1][2]:
        (_, head, _), *middle, (start, tail, owner) = found
        return [*middle, (start, tail + head, owner)]
    return found
