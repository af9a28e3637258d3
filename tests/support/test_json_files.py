"""JSON is written as Python's encoder writes it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vraxion_ckpt.support.json_files import dump_json

_TEXTS = st.text() | st.sampled_from(["},\n      {", ": null}", "a,\n  b", "[{", "\u2028"])
_KEYS = _TEXTS | st.integers() | st.booleans() | st.none()
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXTS
_ROWS = st.lists(st.dictionaries(_TEXTS, _SCALARS))
_VALUES = st.recursive(
    _SCALARS | _ROWS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(_KEYS, inner),
    max_leaves=10,
)


@given(_VALUES)
def test_every_value_is_written_as_pythons_encoder_indents_it(value: object) -> None:
    assert dump_json(value) == json.dumps(value, indent=2, allow_nan=False).encode()


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": [{"b": float("-inf")}]}])
def test_numbers_that_are_not_finite_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="JSON"):
        dump_json(value)
