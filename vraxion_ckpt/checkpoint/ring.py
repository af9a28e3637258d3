"""Arcs, visits and owners on a ring of addresses. Uses numpy only.

A ring has `L` addresses, 0 … L−1; address 0 follows address L−1. An arc is a run of adjacent addresses, given by its
start and length. It may wrap. `owners` is the router map: the expert that owns each address.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.int64] | NDArray[np.float64]
Ints = NDArray[np.int64]

_PIECE = 2**18  # addresses that are processed at a time, so that temporaries stay small
_DIGIT = 30  # bits of a digit: the sums of 2^33 digits fit into an int64
_MASK = 2**_DIGIT - 1


@dataclass(frozen=True)
class Visits:
    """Visit counts of the addresses of a ring. Arrays have shape ``[L]``.

    Attributes:
        visits: number of visits to each address, finite, ≥ 0.
        loss_sum: loss summed over the visits to each address, or None if it was not recorded.
        note: text for users: the settings, input or seed on which the counts depend besides the checkpoint.
    """

    visits: Weights
    loss_sum: Weights | None = None
    note: str = ""


@dataclass(frozen=True)
class Arc:
    """A run of adjacent addresses on a ring of `ring_len` addresses. It may wrap."""

    start: int
    length: int
    ring_len: int

    @property
    def addresses(self) -> Ints:
        """The addresses in arc order."""
        return (self.start + np.arange(self.length, dtype=np.int64)) % self.ring_len


def as_weights(values: Any) -> Weights:
    """Return `values` as int64 if all are integers and their sum fits, otherwise as float64.

    Integers are summed exactly and written as integers.

    Raises:
        ValueError: the values are not a flat list of finite numbers ≥ 0, they are all zero, or their sum overflows.
    """
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise ValueError("must be a flat list of numbers")
    if not np.isfinite(array).all():
        raise ValueError(f"value {int(np.argmin(np.isfinite(array)))} is not finite")
    if array.size and array.min() < 0:
        raise ValueError(f"value {int(np.argmin(array))} is negative")
    if not array.any():
        raise ValueError("all values are zero")
    with np.errstate(over="ignore"):
        total = float(array.astype(np.float64).sum())
    if not np.isfinite(total):
        raise ValueError("the sum of the values is too large for a float64")
    whole = array.dtype.kind in "iu" or bool((array == np.floor(array)).all())
    if whole and total < 2**62:
        return array.astype(np.int64)
    return array.astype(np.float64)


def exact_sum(weights: Weights) -> int | float:
    """Return the sum of the weights: exact for integers, otherwise rounded once at the end."""
    if weights.dtype.kind == "i":
        return int(weights.sum())
    exact = _Exact.of(weights)
    return exact.rounded(int(digits.sum()) for digits in exact.digits())


def total_by_owner(weights: Weights, owners: Ints, num_experts: int) -> list[int | float]:
    """Return the sum of the weights of each expert's addresses. Addresses with an invalid owner are ignored.

    Sums are exact for integers, otherwise rounded once at the end.
    """
    if owners.min(initial=0) < 0 or owners.max(initial=0) >= num_experts:
        valid = (owners >= 0) & (owners < num_experts)
        owners, weights = owners[valid], weights[valid]

    def totals(values: Ints) -> list[int]:
        sums = np.zeros(num_experts, dtype=np.int64)
        np.add.at(sums, owners, values)
        found: list[int] = sums.tolist()
        return found

    if weights.dtype.kind == "i":
        return list(totals(weights.astype(np.int64, copy=False)))
    exact = _Exact.of(weights)
    return [exact.rounded(sums) for sums in zip(*map(totals, exact.digits()), strict=True)]


@dataclass(frozen=True)
class _Exact:
    """Floats as integers, so that their sums are exact: ``mantissas · 2^shifts · 2^unit``. Arrays have shape ``[L]``.

    Attributes:
        mantissas: integers below 2^53.
        shifts: exponents of two, ≥ 0.
        unit: the exponent of two that all floats have in common.
    """

    mantissas: Ints
    shifts: Ints
    unit: int

    @classmethod
    def of(cls, weights: Weights) -> _Exact:
        """Take floats ≥ 0 apart into the mantissas and exponents of IEEE 754."""
        bits = np.abs(weights).astype(np.float64, copy=False).view(np.int64)
        exponents = bits >> 52
        mantissas = (bits & (2**52 - 1)) + (np.minimum(exponents, 1) << 52)  # subnormals have exponent 0
        np.maximum(exponents, 1, out=exponents)
        lowest = int(exponents.min(initial=2047, where=mantissas > 0))
        return cls(mantissas, np.maximum(exponents - lowest, 0), lowest - 1075)

    def digits(self) -> Iterator[Ints]:
        """Yield the digits of ``mantissas · 2^shifts`` in base 2^30, the least significant first."""
        for place in range(0, int(self.shifts.max(initial=0)) + 53, _DIGIT):
            right = place - self.shifts
            digits = self.mantissas >> np.clip(right, 0, 63)
            digits <<= np.clip(-right, 0, 63)
            digits &= _MASK
            yield digits

    def rounded(self, sums: Iterable[int]) -> float:
        """Return the float that is nearest to a sum, given by the sums of its digits."""
        total = sum(part << (_DIGIT * place) for place, part in enumerate(sums))
        return float(total << self.unit) if self.unit > 0 else total / (1 << -self.unit)


def auto_arc_length(ring_len: int, num_experts: int) -> int:
    """Return half of an equal share of the ring, at least 16: ``max(16, L // (2 · experts))``, limited to 1 … L."""
    return max(1, min(ring_len, max(16, ring_len // (2 * max(1, num_experts)))))


def hottest_arc(weights: Weights, length: int) -> tuple[Arc, int | float]:
    """Return the arc of `length` addresses with the largest sum of weights, and that sum.

    Of several such arcs, the one with the smallest start is returned. Uses prefix sums, O(L). Sums of integers are
    exact. Arcs of floats whose sums are equal within the rounding error are compared exactly, as fractions.

    Args:
        weights: weight of each address, ≥ 0, shape ``[L]``.
        length: length of the arc, 1 … L.

    Raises:
        ValueError: `length` is not in 1 … L.
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
    ring_len = len(weights)
    prefix: Any = np.zeros(ring_len + length, dtype=weights.dtype)
    np.cumsum(weights, out=prefix[1 : ring_len + 1])
    prefix[ring_len + 1 :] = prefix[1:length] + prefix[ring_len]
    sums: Weights = prefix[length:] - prefix[:-length]
    return sums


def _exact_argmax(weights: Weights, length: int, starts: Ints) -> int:
    """Return the first of `starts` whose window has the largest exact sum."""
    sums = []
    carry = np.zeros(len(starts), dtype=np.int64)
    for digits in _Exact.of(weights).digits():
        carry += _window_sums(digits, length)[starts].astype(np.int64, copy=False)
        sums.append(carry & _MASK)
        carry >>= _DIGIT
    best = np.flatnonzero(carry == carry.max())
    for digits in reversed(sums):
        best = best[digits[best] == digits[best].max()]
    return int(starts[best[0]])


def covering_arc(addresses: Sequence[int] | Ints, ring_len: int) -> Arc:
    """Return the shortest arc that contains all `addresses`. If several do, the smallest start decides."""
    points = np.unique(np.asarray(addresses, dtype=np.int64))
    gaps = run_lengths(points, ring_len)  # from each address to the next
    # The arc starts after the widest gap between addresses and ends before it.
    ends = np.flatnonzero(gaps == gaps.max())
    starts = points[(ends + 1) % len(points)]
    return Arc(int(starts.min()), ring_len - int(gaps.max()) + 1, ring_len)


def in_arc_order(addresses: Sequence[int] | Ints, arc: Arc) -> list[int]:
    """Return addresses sorted by their distance from the arc's start along the ring."""
    array = np.asarray(addresses, dtype=np.int64)
    order = np.argsort((array - arc.start) % arc.ring_len, kind="stable")
    ordered: list[int] = array[order].tolist()
    return ordered


def as_addresses(values: Sequence[int], ring_len: int) -> Ints | None:
    """Return a list of addresses as an array, or None if one is outside the ring."""
    if values and not 0 <= min(values) <= max(values) < ring_len:
        return None
    return np.fromiter(values, np.int64, len(values))


def arc_starts(owners: Ints) -> Ints:
    """Return the first address of each arc of addresses with one owner. The last arc may wrap."""
    begins = np.empty(len(owners), dtype=bool)
    begins[0] = owners[0] != owners[-1]
    np.not_equal(owners[1:], owners[:-1], out=begins[1:])
    return np.flatnonzero(begins) if begins.any() else np.zeros(1, dtype=np.int64)


def run_lengths(starts: Ints, ring_len: int) -> Ints:
    """Return the distance from each of the ascending addresses `starts` to the next, and from the last to the first."""
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1] = starts[0] + ring_len - starts[-1]
    return lengths


def owning_experts(owners: Ints) -> set[int]:
    """Return the experts that own an address."""
    pieces = (owners[first : first + _PIECE] for first in range(0, len(owners), _PIECE))
    return {int(owner) for piece in pieces for owner in np.unique(piece)}


def count_pairs(old: Ints, new: Ints) -> dict[tuple[int, int], int]:
    """Count the addresses of each pair of owners in two router maps of the same ring.

    Args:
        old: the owner of each address in the first map, ≥ 0, shape ``[L]``.
        new: the owner of each address in the second map, ≥ 0, shape ``[L]``.

    Returns:
        the number of addresses by old and new owner, in ascending order.
    """
    ids = int(max(old.max(), new.max())) + 1
    found: dict[int, int] = {}
    for first in range(0, len(old), _PIECE):
        codes = old[first : first + _PIECE] * ids + new[first : first + _PIECE]
        kinds, counts = np.unique(codes, return_counts=True)
        for code, number in zip(kinds.tolist(), counts.tolist(), strict=True):
            found[code] = found.get(code, 0) + number
    return {divmod(code, ids): found[code] for code in sorted(found)}
