"""Numbers, plurals and lists in messages."""

import pytest

from vraxion_ckpt.wording import count, listed, numbered


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "address", "1 address"),
        (0, "address", "0 addresses"),
        (4096, "address", "4,096 addresses"),
        (2, "entry", "2 entries"),
        (2, "key", "2 keys"),
        (2, "branch", "2 branches"),
        (1, "file", "1 file"),
        (2, "file", "2 files"),
    ],
)
def test_a_number_of_things_is_told_in_the_singular_or_the_plural(number, noun, text):
    assert count(number, noun) == text


def test_a_long_list_is_cut_and_its_length_told():
    assert listed([]) == ""
    assert listed("abc", 3) == "a, b, c"
    assert listed("abcd", 3) == "a, b, c, … (4 in all)"
    assert listed(range(2000), 2, "; ") == "0; 1; … (2,000 in all)"


def test_what_has_a_number_is_named_by_it():
    assert numbered("expert", [3]) == "expert 3"
    assert numbered("expert", {0, 1}) == "experts 0, 1"
    assert numbered("expert", range(9), 2) == "experts 0, 1, … (9 in all)"
