"""The text of errors, and copies of errors with other attributes."""

import pytest

from vraxion_ckpt.errors import CorruptError, OutOfMemoryError, StorageError, UsageError, errors_at


def test_an_error_with_other_facts_is_another_error_of_the_same_class():
    first = CorruptError("is damaged", key="a", hint="copy it again")
    first.add_note("seen twice")
    second = first.with_facts(path="x.pt", hint=None)
    assert type(second) is CorruptError
    assert (str(first), str(second)) == ("[a]: is damaged\n  → copy it again", "x.pt [a]: is damaged")
    assert second.__notes__ == ["seen twice"]
    assert OutOfMemoryError().with_facts(path="x.pt").exit_code == StorageError.exit_code


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({}, "refused"),
        ({"written": ()}, "refused; nothing was written"),
        ({"written": ["a"]}, "refused; a was written"),
        ({"written": ["a", "b"], "not_written": ["c"]}, "refused; a was written, b was written, c was not"),
    ],
)
def test_an_error_says_which_targets_are_in_place(facts, told):
    assert str(UsageError("refused", **facts)) == told
    assert str(UsageError("refused").with_facts(**facts)) == told


def test_a_path_is_named_where_none_is():
    with pytest.raises(CorruptError, match="outer: is damaged"), errors_at("outer"):
        raise CorruptError("is damaged")
    with pytest.raises(CorruptError, match="inner: is damaged"), errors_at("outer"):
        raise CorruptError("is damaged", path="inner")


def test_a_key_is_named_where_there_is_no_place_at_all():
    with pytest.raises(UsageError, match=r"^\[step\]: refused"), errors_at(key="step"):
        raise UsageError("refused")
    with pytest.raises(UsageError, match=r"^a: refused"), errors_at(key="step"):
        raise UsageError("refused", path="a")
