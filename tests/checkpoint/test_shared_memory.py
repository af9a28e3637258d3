"""Which tensors share memory, and which are tied."""

import pytest
import torch

from vraxion_ckpt.checkpoint.references import reference
from vraxion_ckpt.checkpoint.shared_memory import fills_storage, sharing, view_of, without_tied

BASE = torch.arange(24.0).reshape(4, 6)
CASES = {
    "itself": (BASE, True, True),
    "the same view again": (BASE.view(4, 6), True, True),
    "with a dimension of one entry": (BASE.unsqueeze(0).squeeze(0), True, True),
    "another shape": (BASE.view(6, 4), True, False),
    "other strides": (BASE.t(), True, False),
    "another dtype": (BASE.view(torch.int32), True, False),
    "a part": (BASE[1:3], True, False),
    "a column": (BASE[:, 2], True, False),
    "an empty part": (BASE[:0], False, False),
    "a copy": (BASE.clone(), False, False),
}


@pytest.mark.parametrize(("other", "shares", "tied"), CASES.values(), ids=CASES)
def test_what_shares_memory_and_what_is_tied(other, shares, tied):
    assert sharing([("a", BASE), ("b", other)]) == ([[("a", BASE), ("b", other)]] if shares else [])
    assert (view_of(reference(BASE)) == view_of(reference(other))) is tied
    assert len(without_tied([("a", BASE), ("b", other)])) == (1 if tied else 2)


def test_parts_of_one_storage_that_do_not_overlap_share_nothing():
    upper, lower = BASE[:2], BASE[2:]
    assert sharing([("upper", upper), ("lower", lower)]) == []
    both = [("lower", lower), ("upper", upper), ("whole", BASE)]
    assert sharing(both) == [both]  # each with the whole


def test_groups_and_their_members_keep_the_order_given():
    a, b = torch.ones(2), torch.ones(2)
    given = [("b", b), ("a", a), ("c", torch.ones(2)), ("a again", a), ("b again", b)]
    assert [[name for name, _ in group] for group in sharing(given)] == [["b", "b again"], ["a", "a again"]]


def test_empty_tensors_are_never_tied():
    empty = torch.ones(0)
    assert sharing([("a", empty), ("b", empty)]) == []
    assert len(without_tied([("a", empty), ("b", empty)])) == 2


def test_an_extent_reaches_to_the_last_element():
    assert reference(BASE).extent() == (0, BASE.data_ptr(), 24 * 4)
    assert reference(BASE[:, 0]).extent() == (0, BASE.data_ptr(), (3 * 6 + 1) * 4)
    assert reference(BASE[1]).extent() == (0, BASE.data_ptr() + 24, 24)
    assert reference(torch.ones(0)).extent()[2] == 0


def test_a_part_does_not_fill_its_storage():
    assert fills_storage(BASE)
    assert not fills_storage(BASE[1:])
