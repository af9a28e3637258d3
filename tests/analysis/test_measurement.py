"""The largest difference of integers against Python's integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vraxion_ckpt.analysis.measurement import measure
from vraxion_ckpt.checkpoint.references import reference

SIGNED, UNSIGNED = st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("one", "other"), [(np.int64, np.int64), (np.uint64, np.uint64), (np.int64, np.uint64), (np.uint64, np.int64)]
)
@given(data=st.data())
def test_differences_of_integers_are_exact(one, other, data):
    sides = [st.lists(UNSIGNED if dtype is np.uint64 else SIGNED, min_size=5, max_size=5) for dtype in (one, other)]
    a, b = (data.draw(side) for side in sides)
    found = measure([(reference(torch.from_numpy(np.array(a, one))), reference(torch.from_numpy(np.array(b, other))))])
    gap = max(abs(x - y) for x, y in zip(a, b, strict=True))
    assert found.max_abs == (float(gap) if gap else None)


@given(st.integers(-128, 127), st.integers(-128, 127))
@example(-128, 127)
def test_small_integers_do_not_overflow(a, b):
    one, other = (reference(torch.tensor([value], dtype=torch.int8)) for value in (a, b))
    found = measure([(one, other)])
    assert found.max_abs == (abs(a - b) if a != b else None)


def test_bools_differ_by_one():
    found = measure([(reference(torch.tensor([True, False])), reference(torch.tensor([False, False])))])
    assert (found.elements, found.max_abs) == (1, 1.0)
