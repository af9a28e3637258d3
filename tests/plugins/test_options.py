"""Options of plugins: how they are written, what is refused, and that all that is wrong is said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import field_validator

from vraxion_ckpt.errors import OptionError, PluginError, StorageError, UsageError
from vraxion_ckpt.plugins.options import (
    IntList,
    Plugin,
    configure,
    expand_ranges,
    parse_call,
    problems_with,
    recorded_options,
)


class Example(Plugin):
    """Have an option of each kind.

    And a second paragraph.
    """

    name: ClassVar[str] = "example"
    expert: int
    factor: float = 1.0
    addresses: IntList = ()
    path: Path | None = None


class Broken(Plugin):
    """Fail while options are checked."""

    name: ClassVar[str] = "broken"
    how: str

    @field_validator("how")
    @classmethod
    def fails(cls, how: str) -> str:
        if how == "key":
            raise KeyError(how)
        if how == "file":
            raise FileNotFoundError(2, "No such file", "lost.json")
        if how == "exit":
            raise SystemExit(3)
        raise ValueError("must be another way")


class Lists(Plugin):
    """Dump a list."""

    name: ClassVar[str] = "lists"

    def model_dump(self, **_):
        return [1]


# --- the text ---


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("scale", "scale", {}),
        ("scale:", "scale", {}),
        (" scale : expert = 1 ", "scale", {"expert": " 1 "}),
        ("scale:expert=1,factor=0.5", "scale", {"expert": "1", "factor": "0.5"}),
        ("scale:expert=1,,", "scale", {"expert": "1"}),
        ("scale:max-size=1", "scale", {"max_size": "1"}),
        ("scale:addresses=[1,3,8-15],to=2", "scale", {"addresses": "[1,3,8-15]", "to": "2"}),
        ('scale:path="a,b]=c",to=2', "scale", {"path": "a,b]=c", "to": "2"}),
        ("scale:path=C:/a=b", "scale", {"path": "C:/a=b"}),
        ('scale:path=""', "scale", {"path": ""}),
        ('scale:path="', None, None),
        ("scale:path=[1", None, None),
        ("scale:path=1]", None, None),
        ("scale:path=[[1]]", None, None),
        ("scale:expert", None, None),
        ("scale:=1", None, None),
        ("scale:expert=1,expert=2", None, None),
        ("scale:max-size=1,max_size=2", None, None),
        (":expert=1", None, None),
        ("", None, None),
    ],
)
def test_the_text_form_is_split_or_refused(text, name, options):
    if name is None:
        with pytest.raises(UsageError) as refused:
            parse_call(text)
        assert refused.value.exit_code == UsageError.exit_code
    else:
        assert parse_call(text) == (name, options)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[]", []),
        ("[1,3,8-15]", [1, 3, *range(8, 16)]),
        (" [ 1 , 2 ] ", [1, 2]),
        ("[-3,5-5]", [-3, 5]),
        (["1-3", 7], [1, 2, 3, 7]),
        ([1, 2], [1, 2]),
        ((4,), (4,)),
        (None, None),
    ],
)
def test_ranges_are_written_out(value, expected):
    assert expand_ranges(value) == expected


@pytest.mark.parametrize("value", ["1", "[1", "[x]", "[3-1]", "[1.5]", "[0-99999999999]", "[1--2]", ["x"], "[٣-x]"])
def test_what_is_no_list_of_numbers_is_refused(value):
    with pytest.raises(ValueError, match=r"."):
        expand_ranges(value)


# --- the values ---


def test_values_are_converted_to_the_types_of_the_fields():
    plugin = configure(Example, {"expert": "2", "factor": "0.5", "addresses": "[0-2]", "path": "a/b"})
    assert (plugin.expert, plugin.factor, plugin.addresses, plugin.path) == (2, 0.5, (0, 1, 2), Path("a/b"))


@pytest.mark.parametrize(
    ("options", "at_fault"),
    [
        ({}, ["expert"]),
        ({"expert": "x"}, ["expert"]),
        ({"expert": 1, "factr": 2}, ["factr"]),
        ({"factor": "x", "nothing_like": 1}, ["expert", "factor", "nothing_like"]),
        ({"expert": 1, "addresses": "[3-1]"}, ["addresses"]),
        ({"expert": 1, "addresses": "[0-99999999999]"}, ["addresses"]),
    ],
)
def test_all_that_is_wrong_is_said_in_one_error(options, at_fault):
    assert sorted(option for option, _ in problems_with(Example, options)) == sorted(at_fault)
    with pytest.raises(OptionError) as refused:
        configure(Example, options)
    assert refused.value.key == "example"
    assert "describe example" in refused.value.hint
    for option in at_fault:
        assert repr(option) in refused.value.message


def test_a_misspelt_option_is_answered_with_its_neighbour():
    ((_, what),) = problems_with(Example, {"expert": 1, "factr": 2})
    assert "'factor'" in what


def test_nothing_is_wrong_with_what_can_be_configured():
    assert problems_with(Example, {"expert": 1}) == []


@pytest.mark.parametrize(("how", "error"), [("key", PluginError), ("exit", PluginError), ("file", StorageError)])
def test_a_validator_that_fails_in_its_own_way_is_an_error_of_the_plugin_or_of_its_file(how, error):
    with pytest.raises(error) as refused:
        configure(Broken, {"how": how})
    assert type(refused.value) is error
    if error is PluginError:
        assert "broken" in str(refused.value)
    else:
        assert refused.value.path == Path("lost.json")


def test_a_validators_value_error_is_a_wrong_option():
    with pytest.raises(OptionError, match="must be another way") as refused:
        configure(Broken, {"how": "x"})
    assert refused.value.key == "broken"


# --- for the history ---


def test_every_option_is_recorded_as_plain_json():
    options = recorded_options(configure(Example, {"expert": 1, "addresses": "[1-2]", "path": "a"}))
    assert json.loads(json.dumps(options)) == {
        "expert": 1,
        "factor": 1.0,
        "addresses": [1, 2],
        "path": "a",
    }


def test_a_plugin_that_dumps_no_dict_is_a_defect_of_the_plugin():
    with pytest.raises(PluginError) as refused:
        recorded_options(Lists())
    assert "lists" in str(refused.value)


def test_the_summary_is_the_first_line():
    assert Example.summary() == "Have an option of each kind."
