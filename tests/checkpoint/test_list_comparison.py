"""Lists of scalars are compared in runs, with the result of comparing entry by entry."""

from __future__ import annotations

import struct
from unittest import mock

from hypothesis import example, given
from hypothesis import strategies as st

from vraxion_ckpt.checkpoint import comparison
from vraxion_ckpt.checkpoint.comparison import differences

QUIET, LOUD = (struct.unpack("<d", struct.pack("<Q", bits))[0] for bits in (0x7FF8000000000000, 0x7FF8000000000001))
entries = st.one_of(
    st.sampled_from([0, 0.0, -0.0, False, None, "0", 1, True, QUIET, LOUD, 2**70, [0.0], [-0.0]]), st.floats()
)


def bits(value: object) -> object:
    return struct.pack("<d", value) if isinstance(value, float) else value


def same(x: object, y: object) -> bool:
    if isinstance(x, list) and isinstance(y, list):
        return len(x) == len(y) and all(map(same, x, y))
    return type(x) is type(y) and bits(x) == bits(y)


@given(
    st.lists(st.one_of(entries, entries.map(lambda entry: (entry, entry)), st.tuples(entries, entries)), max_size=20)
)
@example([(0.0, -0.0)])
@example([(QUIET, LOUD), (QUIET, QUIET)])
@example([(1, True), (0, 0.0)])
def test_each_differing_entry_is_named(rows):
    pairs = [row if isinstance(row, tuple) else (row, row) for row in rows]
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    with mock.patch.object(comparison, "_RUN", 3):
        lines = list(differences(a, b, "losses"))
        places = [line.partition(":")[0] for line in differences(tuple(a), tuple(b), "losses")]
    wrong = [i for i, (x, y) in enumerate(pairs) if not same(x, y)]
    assert [line.partition("]")[0] for line in lines] == [f"losses[{i}" for i in wrong]
    assert [place.partition("]")[0] for place in places] == [f"losses[{i}" for i in wrong]
