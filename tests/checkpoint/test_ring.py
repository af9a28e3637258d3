"""Ring and arc algebra against brute force with exact fractions."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vraxion_ckpt.checkpoint import ring

whole = st.lists(st.integers(0, 50), min_size=1, max_size=40)
# Tenths are the worst: they are not exact in binary, so equal sums differ in floating point.
tenths = st.lists(st.integers(0, 9).map(lambda n: n / 10), min_size=1, max_size=40)
wild = st.lists(st.floats(0, 1e30, allow_subnormal=True), min_size=1, max_size=40)


def brute_force(values: list[float], length: int) -> tuple[int, Fraction]:
    exact = [Fraction(value) for value in values]
    sums = [sum(exact[(s + i) % len(exact)] for i in range(length)) for s in range(len(exact))]
    return sums.index(max(sums)), max(sums)


@given(st.one_of(whole, tenths, wild), st.integers(1, 40))
@example([0.1] * 10, 3)
@example([0.3, 0.1, 0.2, 0.3, 0.1, 0.2], 2)
def test_the_hottest_arc_is_the_exact_one_and_ties_go_to_the_smallest_start(values, length):
    length = min(length, len(values))
    if not any(values):
        return
    arc, score = ring.hottest_arc(ring.as_weights(values), length)
    start, total = brute_force(values, length)
    assert arc.start == start
    assert score == pytest.approx(float(total), rel=1e-15)
    if sum(values) < 2**53:
        assert isinstance(score, int) == all(float(v).is_integer() for v in values)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=60), st.booleans())
def test_totals_by_owner_are_exact_and_leave_out_invalid_owners(pairs, tenth):
    weights = [w / 10 if tenth else w for w, _ in pairs]
    if not any(weights):
        return
    owners = np.array([owner for _, owner in pairs])
    totals = ring.total_by_owner(ring.as_weights(weights), owners, 3)
    for expert in range(3):
        exact = sum((Fraction(w) for w, o in zip(weights, owners, strict=True) if o == expert), Fraction())
        assert totals[expert] == float(exact)


@given(st.sets(st.integers(0, 29), min_size=1), st.just(30))
def test_the_covering_arc_is_the_shortest_that_holds_all(addresses, ring_len):
    arc = ring.covering_arc(sorted(addresses), ring_len)
    assert addresses <= set(arc.addresses.tolist())
    shortest = min(
        length
        for length in range(1, ring_len + 1)
        for start in range(ring_len)
        if addresses <= {(start + i) % ring_len for i in range(length)}
    )
    assert arc.length == shortest


def test_an_arc_wraps():
    assert ring.Arc(6, 4, 8).addresses.tolist() == [6, 7, 0, 1]
    assert ring.in_arc_order([0, 1, 6, 7], ring.Arc(6, 4, 8)) == [6, 7, 0, 1]


@pytest.mark.parametrize(
    ("ring_len", "experts", "length"), [(64, 1, 32), (64, 3, 16), (1000, 2, 250), (10, 1, 10), (1, 9, 1)]
)
def test_the_automatic_arc_length(ring_len, experts, length):
    assert ring.auto_arc_length(ring_len, experts) == length


@given(st.lists(st.integers(0, 3), min_size=1, max_size=50))
def test_arcs_cover_the_ring_with_one_owner_each(owners):
    rebuilt: list[int | None] = [None] * len(owners)
    starts = ring.arc_starts(np.array(owners))
    lengths = ring.run_lengths(starts, len(owners))
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        for address in range(start, start + length):
            assert rebuilt[address % len(owners)] is None
            rebuilt[address % len(owners)] = owners[start]
    assert rebuilt == owners
    changes = sum(owner != owners[i - 1] for i, owner in enumerate(owners))
    assert len(starts) == max(1, changes)  # no two adjacent arcs have the same owner


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60))
def test_pairs_of_owners_are_counted_across_pieces(pairs):
    old, new = (np.array(side) for side in zip(*pairs, strict=True))
    with mock.patch.object(ring, "_PIECE", 7):
        assert list(ring.count_pairs(old, new).items()) == sorted(Counter(pairs).items())


def test_pairs_of_owners_with_large_ids_are_counted():
    old, new = np.array([10**9, 0, 10**9]), np.array([0, 10**9, 0])
    assert ring.count_pairs(old, new) == {(0, 10**9): 1, (10**9, 0): 2}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "all values are zero"),
        ([0, 0.0], "all values are zero"),
        ([1, -1], "value 1 is negative"),
        ([1, float("nan")], "value 1 is not finite"),
        ([[1, 2]], "a flat list"),
        (["1"], "a flat list"),
        ([True, False], "a flat list"),
    ],
)
def test_weights_that_are_none_are_refused(values, reason):
    with pytest.raises(ValueError, match=reason):
        ring.as_weights(values)


def test_an_arc_longer_than_the_ring_is_refused():
    with pytest.raises(ValueError, match="not in 1 … 3"):
        ring.hottest_arc(ring.as_weights([1, 2, 3]), 4)


@given(wild)
def test_sums_of_floats_are_rounded_once(values):
    weights = np.array(values)
    assert ring.exact_sum(weights) == math.fsum(values)


@given(st.lists(st.integers(-3, 12), min_size=1))
def test_addresses_become_an_array_unless_one_is_off_the_ring(values):
    found = ring.as_addresses(values, 10)
    assert (found is None) == any(not 0 <= value < 10 for value in values)
    assert found is None or found.tolist() == values


def test_addresses_beyond_64_bits_are_off_the_ring():
    assert ring.as_addresses([0, 2**70], 10) is None


def test_the_owning_experts_are_found_in_every_piece():
    with mock.patch.object(ring, "_PIECE", 2):
        assert ring.owning_experts(np.array([3, 3, -1, 0, 3])) == {-1, 0, 3}
