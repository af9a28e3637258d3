"""A `TensorDict` behaves as a dict of tensors, whatever way its entries are reached."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same
from torch import Tensor

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint import plain_data
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer
from vraxion_ckpt.checkpoint.plain_data import check_plain
from vraxion_ckpt.checkpoint.references import TensorRef, reference
from vraxion_ckpt.checkpoint.source_files import Sources
from vraxion_ckpt.checkpoint.tensor_dict import PackedFloats, TensorDict, packed, referenced, resolved
from vraxion_ckpt.errors import LimitError, UnsupportedError
from vraxion_ckpt.formats.torch_reader import load_torch_references


def plain() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator)
    return {
        "weight": weight,
        "turned": weight.T,
        "step": 7,
        "text": "x",
        "none": None,
        "slots": {"exp_avg": torch.randn(5, generator=generator), "deeper": [torch.arange(3), (torch.ones(2), 1.5)]},
        "losses": [0.5, 0.25],
        "empty": {},
    }


@pytest.fixture(params=["references of a file", "references of memory", "tensors"])
def held(request: pytest.FixtureRequest, tmp_path: Path) -> TensorDict[str, Any]:
    """The entries of `plain`, from where tensors may come."""
    if request.param == "tensors":
        return TensorDict(plain())
    if request.param == "references of memory":
        return TensorDict(referenced(plain()))
    torch.save(plain(), tmp_path / "a.pt")
    return TensorDict(load_torch_references(tmp_path / "a.pt", Sources()))


def no_references(value: Any) -> None:
    """Fail if a value that a plugin got holds something other than plain data with tensors."""
    assert type(value) in (dict, OrderedDict, list, tuple, str, int, float, bool, type(None), Tensor), type(value)
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        no_references(entry)


# Ways to get all entries as a plain dict.
READ: dict[str, Callable[[TensorDict[str, Any]], dict[str, Any]]] = {
    "indexing": lambda x: {key: x[key] for key in x},
    "dict": lambda x: dict(x),
    "dict of pairs": lambda x: dict([*x.items()]),
    "dict with more": lambda x: {key: value for key, value in dict(x, more=1).items() if key != "more"},
    "unpacking": lambda x: {**x},
    "keyword arguments": lambda x: (lambda **entries: entries)(**x),
    "union": lambda x: x | {},
    "union from the right": lambda x: {} | x,
    "update of a dict": lambda x: (found := {}, found.update(x))[0],
    "in-place union of a dict": lambda x: (found := {}, found.__ior__(x))[0],
    "items": lambda x: dict(x.items()),
    "values": lambda x: dict(zip(x.keys(), x.values(), strict=True)),
    "reversed items": lambda x: dict(reversed([*reversed(x.items())])),
    "reversed values": lambda x: dict(zip(x, reversed([*reversed(x.values())]), strict=True)),
    "get": lambda x: {key: x.get(key) for key in x},
    "pop": lambda x: {key: x.pop(key) for key in list(x)},
    "popitem": lambda x: dict(reversed([x.popitem() for _ in range(len(x))])),
    "setdefault": lambda x: {key: x.setdefault(key, "absent") for key in x},
    "copy": lambda x: dict(x.copy()),
    "copy.copy": lambda x: dict(copy.copy(x)),
    "copy of a copy": lambda x: dict(TensorDict(TensorDict(x))),
    "copy.deepcopy": lambda x: dict(copy.deepcopy(x)),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: saved_and_loaded(x),
    "OrderedDict": lambda x: dict(OrderedDict(x)),
    "matching": lambda x: matched(x),
}


def saved_and_loaded(value: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(dict(value), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def matched(value: Any) -> dict[str, Any]:
    match value:
        case {"weight": weight, **rest}:
            return {"weight": weight, **rest}
    raise AssertionError("it does not match the pattern of a mapping")


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_every_way_to_read_gives_tensors(read, held):
    found = read(held)
    no_references(found)
    assert_same(found, plain())


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_a_second_look_gives_the_same(read, held):
    if read in (READ["pop"], READ["popitem"]):
        pytest.skip("it removes the entries")
    read(held)
    assert_same(read(held), plain())


def test_questions_that_need_no_tensor_are_answered_as_by_a_dict(held):
    expected = plain()
    assert isinstance(held, dict)
    assert len(held) == len(expected)
    assert list(held) == list(held.keys()) == list(expected)
    assert list(reversed(held)) == list(reversed(expected))
    assert "weight" in held
    assert "nothing" not in held
    assert held.keys() & {"step", "other"} == {"step"}
    assert bool(held)
    assert not TensorDict()
    assert held.get("nothing") is None
    assert held.get("nothing", 3) == 3
    assert held.pop("nothing", 3) == 3
    for missing in (lambda: held["nothing"], lambda: held.pop("nothing"), lambda: TensorDict().popitem()):
        with pytest.raises(KeyError):
            missing()
    with pytest.raises(TypeError):
        hash(held)


def test_json_and_repr_are_those_of_a_dict():
    value = {"step": 7, "losses": [0.5, 0.25], "more": {"a": [1, None, True]}}
    assert json.dumps(TensorDict(value)) == json.dumps(value)
    assert json.dumps({"in": TensorDict(value)}, indent=1) == json.dumps({"in": value}, indent=1)
    assert repr(TensorDict(plain())) == repr(plain())


def test_it_is_equal_to_a_dict_with_the_same_entries():
    value = {"step": 7, "losses": [0.5], "more": {"a": (1, 2)}}
    assert TensorDict(value) == value == TensorDict(value)
    assert value == TensorDict(value)
    assert TensorDict(value) != {**value, "step": 8}
    assert TensorDict(value) != 3


# Ways to set one entry.
WRITE: dict[str, Callable[[Any, str, Any], object]] = {
    "item": lambda x, key, value: x.__setitem__(key, value),
    "update": lambda x, key, value: x.update({key: value}),
    "update by keyword": lambda x, key, value: x.update(**{key: value}),
    "update by pairs": lambda x, key, value: x.update([(key, value)]),
    "union": lambda x, key, value: x.__ior__({key: value}),
    "union of a TensorDict": lambda x, key, value: x.__ior__(TensorDict({key: value})),
    "setdefault": lambda x, key, value: (x.pop(key, None), x.setdefault(key, value)),
}
VALUES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.arange(4),
    "dict": lambda: {"a": torch.arange(4), "b": [torch.ones(1)]},
    "list": lambda: [torch.arange(4), 1],
    "number": lambda: 3,
    "none": lambda: None,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("write", WRITE.values(), ids=WRITE)
def test_what_is_assigned_comes_back_as_the_same_object(write, value, held):
    given, expected = value(), plain()
    for key in ("weight", "slots", "new"):
        write(held, key, given)
        write(expected, key, given)
        assert held[key] is given
        assert dict(held)[key] is given
    assert_same(dict(held), expected)


def test_entries_are_removed_and_ordered_as_in_a_dict(held):
    expected = plain()
    for each in (held, expected):
        del each["weight"]
        each["weight"] = each.pop("slots")
        each.pop("step")
        each.update(text="y", other=1)
    assert_same(dict(held), expected)
    held.clear()
    assert dict(held) == {}


def test_the_same_tensor_is_found_each_time(held):
    weight = held["weight"]
    moments = held["slots"]["exp_avg"]
    assert held["weight"] is weight is dict(held)["weight"] is held.get("weight") is next(iter(held.values()))
    assert held["slots"] is held["slots"]
    assert held["slots"]["exp_avg"] is moments
    other = TensorDict(held)
    assert other["weight"] is weight
    assert other["slots"]["exp_avg"] is moments
    assert held.reference("weight") is held.references()["weight"] is other.references()["weight"] is reference(weight)


def test_a_copy_that_was_made_before_the_first_look_gives_the_same_tensors(held):
    other = TensorDict(held)
    assert other["weight"] is held["weight"]
    assert other["slots"] is held["slots"]


def test_a_change_of_a_nested_container_stays(held):
    held["losses"].append(0.125)
    held["slots"]["new"] = torch.zeros(1)
    del held["slots"]["exp_avg"]
    assert held["losses"] == [0.5, 0.25, 0.125]
    assert list(held["slots"]) == ["deeper", "new"]
    found = held.references()
    assert found["losses"] == [0.5, 0.25, 0.125]
    assert list(found["slots"]) == ["deeper", "new"]
    assert isinstance(found["slots"]["new"], TensorRef)


def test_references_make_no_tensor(tmp_path):
    torch.save(plain(), tmp_path / "a.pt")
    held = TensorDict(load_torch_references(tmp_path / "a.pt", Sources()))
    for value in (held.references(), held.copy().references(), copy.deepcopy(held).references(), held.as_stored()):
        assert isinstance(value["weight"], TensorRef)
        assert isinstance(value["slots"]["exp_avg"], TensorRef)
        assert isinstance(value["slots"]["deeper"][1][0], TensorRef)
    assert held.reference("weight").storage.given is None
    held["weight"]
    assert held.reference("weight").storage.given is not None
    assert held.reference("slots")["exp_avg"].storage.given is None


def test_views_of_one_storage_still_share_memory(held):
    weight, turned = held["weight"], held["turned"]
    assert weight.data_ptr() == turned.data_ptr()
    found = held.references()
    assert found["weight"].storage is found["turned"].storage
    assert found["weight"].storage is not found["slots"]["exp_avg"].storage


def test_a_deep_copy_keeps_ties_and_shares_no_memory(held):
    other = copy.deepcopy(held)
    assert other["weight"].data_ptr() == other["turned"].data_ptr() != held["weight"].data_ptr()
    other["weight"].zero_()
    other["slots"]["exp_avg"].zero_()
    assert_same(dict(held), plain())
    assert not other["turned"].any()


def test_an_ordered_dict_keeps_its_type_and_attributes(tmp_path):
    state = OrderedDict(a=torch.ones(2))
    state._metadata = OrderedDict({"": {"version": 2}})
    torch.save({"ema": state}, tmp_path / "a.pt")
    for value in ({"ema": state}, load_torch_references(tmp_path / "a.pt", Sources())):
        found = TensorDict(value)["ema"]
        assert type(found) is OrderedDict
        assert_same(found, state)
        assert_same(resolved(TensorDict(value).references())["ema"], state)


def test_containers_without_tensors_are_passed_on_as_they_are():
    for value in ([1, 2], (1, "a"), {"a": [1, (None,)]}, OrderedDict(a=1), [], {}, "text", None, 0.5):
        assert referenced(value) is value
        assert resolved(value) is value


@pytest.mark.parametrize("name", ["core", "payload"])
def test_a_checkpoint_makes_a_tensor_dict_of_a_plain_dict(name):
    weight = torch.ones(2)
    checkpoint = Checkpoint(**{"core": {}, name: {"weight": weight}})
    assert_same(dict(getattr(checkpoint, name)), {"weight": weight})
    setattr(checkpoint, name, {"other": weight})
    for found in (checkpoint, replace(checkpoint), replace(checkpoint, **{name: {"other": weight}}), checkpoint.copy()):
        assert type(getattr(found, name)) is TensorDict
        assert getattr(found, name)["other"] is weight
    given = TensorDict({"same": weight})
    setattr(checkpoint, name, given)
    assert getattr(checkpoint, name) is given


def test_fields_have_the_defaults_of_their_declaration():
    assert type(Checkpoint({}).payload) is TensorDict
    assert Checkpoint({}).payload is not Checkpoint({}).payload
    assert type(Optimizer([], {}).extra) is TensorDict
    assert Checkpoint({}) == Checkpoint({}, payload={})
    assert copy.deepcopy(Checkpoint({"a": torch.ones(1)})).core["a"].item() == 1
    for missing in (Checkpoint, lambda: Optimizer([])):
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            missing()


def test_what_is_no_dict_is_left_to_the_check_of_types():
    from vraxion_ckpt.checkpoint.type_checks import wrong_type

    checkpoint = Checkpoint({})
    checkpoint.core = None
    assert wrong_type(checkpoint) == "core is a NoneType, not dict[str, Tensor]"
    checkpoint.core = {"a": [torch.ones(1)]}
    assert wrong_type(checkpoint) == "core['a'] is a list, not a tensor"
    checkpoint.core = {"a": torch.ones(1)}
    assert wrong_type(checkpoint) is None


QUIET, LOUD = (struct.unpack("<d", struct.pack("<Q", bits))[0] for bits in (0x7FF8000000000000, 0x7FF8000000000001))


def long(*last: Any) -> list[Any]:
    """Return a list that is long enough to be packed if all its entries are floats."""
    return [float(i) for i in range(2**14)] + list(last)


def read_again(payload: dict[str, Any], folder: Path) -> Checkpoint:
    """Return the checkpoint that is read from a file with these entries."""
    file = folder / f"{len(list(folder.iterdir()))}.pt"
    torch.save({"model": {"weight": torch.zeros(2)}, **payload}, file)
    return vc.open(file)


@pytest.mark.parametrize("last", [-0.0, QUIET, LOUD, float("-inf")])
def test_a_long_list_of_floats_is_packed_until_somebody_looks(last, tmp_path):
    checkpoint = read_again({"losses": long(last), "log": {"losses": [long(last)]}}, tmp_path)
    stored = checkpoint.payload.as_stored()
    assert type(stored["losses"]) is type(stored["log"]["losses"][0]) is PackedFloats
    for found in (checkpoint.payload.references(), checkpoint.copy().payload):
        for losses in (found["losses"], found["log"]["losses"][0]):
            assert type(losses) is list
            assert [*map(struct.pack, repeat("<d"), losses)] == [*map(struct.pack, repeat("<d"), long(last))]
    found = checkpoint.payload["losses"]
    found.append(1.5)
    assert checkpoint.copy().payload["losses"] is checkpoint.payload["losses"] is found
    assert checkpoint.payload.references()["losses"][-1] == 1.5


@pytest.mark.parametrize("last", [1, True, None, "1", [1.5]])
def test_a_list_with_other_entries_is_not_packed(last, tmp_path):
    losses = read_again({"losses": long(last)}, tmp_path).payload.as_stored()["losses"]
    assert type(losses) is list
    assert type(losses[-1]) is type(last)


@pytest.mark.parametrize("looked", [(), (0,), (0, 1)])
@pytest.mark.parametrize(("one", "other"), [(0.0, -0.0), (QUIET, LOUD), (1.0, 1), (QUIET, QUIET), (0.5, 0.5)])
def test_packed_lists_are_compared_by_their_bits(one, other, looked, tmp_path):
    pair = [read_again({"losses": long(last)}, tmp_path) for last in (one, other)]
    for i in looked:
        assert len(pair[i].payload["losses"]) == 2**14 + 1
    same = type(one) is type(other) and struct.pack("<d", one) == struct.pack("<d", other)
    lines = list(checkpoint_differences(*pair))
    assert [line.partition(":")[0] for line in lines] == ([] if same else ["payload.losses[16384]"])


def test_an_array_of_a_plugin_is_not_plain_data():
    with pytest.raises(UnsupportedError, match=r"is a array\.array"):
        check_plain(TensorDict({"losses": array("d", [0.5])}))


def test_a_packed_list_counts_as_its_entries(monkeypatch):
    monkeypatch.setattr(plain_data, "_MOST_NODES", 2**14)
    with pytest.raises(LimitError, match="holds more than 16384 values"):
        check_plain(packed({"losses": long()}))
