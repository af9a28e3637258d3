"""Values that a document preserves exactly, and invalid documents that must be rejected."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import DATA, assert_same, load
from torch import nn
from vraxion_ckpt_adapters.safetensors import SafetensorsAdapter
from work import bounded

import vraxion_ckpt as vc
from vraxion_ckpt.errors import (
    CkptError,
    InconsistentError,
    LimitError,
    LossError,
    PluginError,
    UnsupportedError,
)

SHARDS = "safetensors:max_shard_size=64B"
WAYS = ["safetensors", SHARDS]
INDEX = "model.safetensors.index.json"


def exact(value: Any) -> Any:
    """Return a value as nested tuples that are equal only for equal types, order and bits; strides are ignored."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        data = plain.view(-1).view(torch.uint8).numpy().tobytes()
        return type(value), value.dtype, tuple(value.shape), value.requires_grad, data
    if isinstance(value, np.ndarray | np.generic):
        return type(value), value.dtype.str, value.shape, np.isfortran(value), value.tobytes()
    if isinstance(value, float):
        return float, struct.pack(">d", value)
    if isinstance(value, complex):
        return complex, struct.pack(">2d", value.real, value.imag)
    if isinstance(value, list | tuple):
        return type(value), tuple(map(exact, value))
    if isinstance(value, set):
        return set, frozenset(map(exact, value))
    if isinstance(value, dict):
        attributes = exact(vars(value)) if isinstance(value, OrderedDict) else None
        return type(value), tuple((exact(key), exact(entry)) for key, entry in value.items()), attributes
    return type(value), value


def of_bits(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Return a tensor of random bits, which include NaNs of all kinds."""
    count = torch.empty(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).view(shape)


FLOATS = ["float64", "float32", "float16", "bfloat16"]
SMALL_FLOATS = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
WHOLE = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
COMPLEX = torch.tensor([[1 + 2j, 3 - 4j], [-0.0 + 0j, 5j]])
NATIVE = {
    **{
        f"bits of {name}": of_bits(getattr(torch, name), 4, 8, seed=seed)
        for seed, name in enumerate([*FLOATS, *SMALL_FLOATS, *WHOLE, "complex64", "bool"])
    },
    "signalling NaNs": torch.tensor([0x7F800001, -0x7FFFFF, 0x7FC01234, -1], dtype=torch.int32).view(torch.float32),
    "signalling NaNs, turned": of_bits(torch.int32, 3, 4).bitwise_or(0x7F800000).view(torch.float32).T,
    "bf16 NaNs": torch.tensor([0x7F81, 0x7FC1, -1, -127], dtype=torch.int16).view(torch.bfloat16),
    "zeros and infinities": torch.tensor([0.0, -0.0, float("inf"), -float("inf")]),
    "no dimension": torch.tensor(3.5, dtype=torch.float64),
    "no element": torch.empty(0),
    "no element, [0, 3]": torch.empty(0, 3, dtype=torch.float16),
    "no element, [2, 0, 3]": torch.empty(2, 0, 3, dtype=torch.int64),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "every other": torch.arange(12.0)[1::2],
    "a column": torch.arange(12, dtype=torch.int16).reshape(3, 4)[:, 1],
    "a part": torch.arange(12.0)[3:7],
    "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(1, 2, 0),
    "conjugate": COMPLEX.conj(),
    "conjugate, turned": COMPLEX.conj().T,
    "negative": COMPLEX.clone().conj().imag,
    "parameter": nn.Parameter(torch.ones(2)),
    "frozen parameter": nn.Parameter(torch.ones(2), requires_grad=False),
    "parameter, turned": nn.Parameter(torch.arange(6.0).reshape(2, 3).T),
    "wants a gradient": torch.ones(2, requires_grad=True),
}
AS_BYTES = {
    "bits of complex128": of_bits(torch.complex128, 3, 2),
    "bits of float4": of_bits(torch.uint8, 5).view(torch.float4_e2m1fn_x2),
    "complex128 without dimension": torch.tensor(1 - 2j, dtype=torch.complex128),
    "complex128 without element": torch.empty(0, 3, dtype=torch.complex128),
    "complex128, turned": of_bits(torch.complex128, 3, 2, seed=1).T,
    "complex128, conjugate": of_bits(torch.complex128, 2, seed=2).conj(),
    "complex128 parameter": nn.Parameter(torch.ones(2, dtype=torch.complex128)),
}
TENSORS = NATIVE | AS_BYTES


def float_of(bits: int) -> float:
    return struct.unpack(">d", bits.to_bytes(8, "big"))[0]


def ordered(attributes: dict[str, Any], **entries: Any) -> OrderedDict[str, Any]:
    found = OrderedDict(entries)
    vars(found).update(attributes)
    return found


PLAIN: dict[str, Any] = {
    "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, float("inf"), -float("inf"), float("nan"), 1e22, 1.0],
    "NaNs": [float_of(0x7FF8000000000001), float_of(0x7FF0000000000001), float_of(0xFFF8DEADBEEF0000)],
    "numbers": [0, -1, True, False, None, 2**63, -(2**64), 10**600, 1, 1.0],
    "text": ["", "é", "😀", '\u2028\0\x1f"\\', "a\ud800b", "\udfff", "$tensor"],
    "tuples": ((), (1, [2, (3,)], {"x": (None,)}), [()]),
    "whole keys": {0: "a", -5: "b", 10**30: "c", "0": "d"},
    "dollar keys": {"$tensor": "x", "$tuple": [1], "$": 2, "a": {"$dict": []}},
    "odd keys": {"": 1, "\ud800": 2, "é": 3, "a/b": 4, "a.b": 5, "\0": 6},
    "empty": [{}, [], (), OrderedDict(), ""],
    "ordered": OrderedDict(b=1, a=OrderedDict({2: float("nan")})),
    "ordered with attributes": ordered({"_metadata": OrderedDict({"": {"version": 2}}), "more": (1,)}, z=1, a=2),
    "nested": {"a": [[[{"b": ({"c": [1.5]},)}]]]},
    "other keys": {1.5: 1, None: 2, (): 3, (1, ("a", None)): 4, True: 5, 0.0: 6, b"x": 7, 1j: 8, torch.int8: 9},
    "NaN keys": {float_of(0x7FF8000000000001): 1, float("nan"): 2},
    "ordered by tuples": OrderedDict({(2, 1): 0, (1, 2): {(True,): -0.0}}),
    "counters": [Counter(), Counter({10: 1, 20: 2}), Counter({"b": 1, ("a", 1): -1, None: 2.5})],
    "sets": [set(), {1, "a", None, 2.5, (1, "b"), b"c"}, {True}, {1.0}],
    "bytes": [b"", b"\0\xff", bytes(range(256)) * 20, bytearray(), bytearray(b"\xff"), bytearray(5000)],
    "complex": [0j, complex(-0.0, float("inf")), complex(float_of(0x7FF8000000000001), 1.5)],
    "sizes": [torch.Size([]), torch.Size([2, 3]), (torch.Size([0]),)],
    "dtypes": [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.bits8, torch.uint3, torch.quint4x2],
    "devices": [torch.device("cpu"), torch.device("cuda", 1), torch.device("mps", 0), torch.device("meta")],
    "layouts": [torch.strided, torch.sparse_csr, torch.per_channel_affine],
    "like ours": {"$float": "7ff8000000000000", "model": [], "version": 1},
}


def bottom(depth: int) -> Any:
    """Return nested containers of alternating kinds."""
    value: Any = "bottom"
    for i in range(depth):
        value = ([value], (value,), {"a": value}, {i: value}, OrderedDict(a=value))[i % 5]
    return value


def trained(**more: Any) -> dict[str, Any]:
    """Return a small checkpoint with a head of two experts and an optimizer, as a trainer saves it."""
    model: dict[str, torch.Tensor] = {"theta": torch.arange(3.0), "router_map": torch.tensor([0, 1, 1, 0])}
    model |= {f"head.experts.{i}.weight": torch.full((2, 2), i + 0.5) for i in range(2)}
    model["last"] = torch.zeros(2)
    names = [name for name in model if name != "router_map"]
    state = {i: {"step": torch.tensor(float(i)), "exp_avg": model[name] + i} for i, name in enumerate(names)}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "params": list(range(len(names)))}
    optim = {"state": state, "param_groups": [group]}
    return {"model": model, "optim": optim, "num_experts": 2, "step": 7, "param_names": names, **more}


def there_and_back(payload: Any, folder: Path, to: str, **options: Any) -> Any:
    torch.save(payload, folder / "source.pt")
    vc.convert(folder / "source.pt", folder / "there", to=to, **options)
    vc.convert(folder / "there", folder / "back.pt")
    return load(folder / "back.pt")


# --- values ---


@pytest.fixture(scope="module", params=WAYS)
def values(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, Any], Path]:
    """Each tensor and each plain value, written and read once at each place that can hold it; shared by the tests."""
    folder = tmp_path_factory.mktemp("values")
    payload = trained(tensors=copy_of(TENSORS), **PLAIN)
    payload["model"] |= copy_of(TENSORS)
    payload["optim"] |= {"tensors": copy_of(TENSORS), "plain": PLAIN}
    payload["optim"]["param_groups"][0] |= {"tensors": copy_of(TENSORS), "plain": PLAIN}
    payload["optim"]["state"][0] |= {"plain": PLAIN}
    payload["model"] = OrderedDict(payload["model"])
    payload["model"]._metadata = OrderedDict({"": {"version": 1}, "plain": PLAIN, "tensors": copy_of(TENSORS)})
    return there_and_back(payload, folder, request.param), payload, folder


def copy_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of the same kind that share no memory with them."""
    return {name: copy.deepcopy(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back_bit_by_bit_wherever_it_stands(name, values):
    back, _, folder = values
    wanted = exact(TENSORS[name])
    places = [back["model"], back["tensors"], back["optim"]["tensors"], back["model"]._metadata["tensors"]]
    places += [back["optim"]["param_groups"][0]["tensors"], vc.open(folder / "there").state_dict()]
    for number, place in enumerate(places):
        assert exact(place[name]) == wanted, number


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_value_comes_back_exactly_wherever_it_stands(name, values):
    back, _, _ = values
    wanted = exact(PLAIN[name])
    places = [back, back["optim"]["plain"], back["optim"]["param_groups"][0]["plain"]]
    places += [back["optim"]["state"][0]["plain"], back["model"]._metadata["plain"]]
    for number, place in enumerate(places):
        assert exact(place[name]) == wanted, number


def test_all_of_it_stands_in_its_old_order(values):
    back, payload, _ = values
    assert exact(back) == exact(payload)


def test_what_the_library_knows_is_stored_as_it_is_and_the_rest_under_no_name_of_the_model(values):
    _, _, folder = values
    files = [folder / "there"] if (folder / "there").is_file() else [*(folder / "there").glob("*.safetensors")]
    held = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for name, tensor in NATIVE.items():
        assert exact(held[name])[1:3] == exact(tensor)[1:3]
        assert exact(held[name])[4] == exact(tensor)[4]
    assert not AS_BYTES.keys() & held.keys()  # bytes under their names would look like these tensors
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in vc.open(folder / "there").state_dict().values())


def test_a_value_at_the_bottom_of_a_hundred_levels_comes_back_and_deeper_is_refused(tmp_path):
    payload = trained(deep=bottom(99))
    assert exact(there_and_back(payload, tmp_path, "safetensors")) == exact(payload)
    torch.save(trained(deep=bottom(100)), tmp_path / "source.pt")
    with pytest.raises(LimitError, match="nested deeper"):
        vc.convert(tmp_path / "source.pt", tmp_path / "deeper.safetensors")


def test_a_contribution_beyond_any_float_is_carried_exactly(tmp_path):
    shutil.copytree(DATA / "modular_experts3", tmp_path / "source")
    meta = tmp_path / "source/experts/meta.json"
    facts = json.loads(meta.read_text())
    facts["experts"][1] |= {"contrib": 10**400, "extra": [1, {"x": None}]}
    meta.write_text(json.dumps(facts))
    vc.convert(tmp_path / "source", tmp_path / "a.safetensors")
    vc.convert(tmp_path / "a.safetensors", tmp_path / "back", to="modular")
    assert json.loads((tmp_path / "back/experts/meta.json").read_text()) == facts


def test_long_keys_are_not_copied_for_every_value_below_them(tmp_path):
    """Copying a megabyte for each of a hundred thousand values, twice, would take 200 gigabytes."""
    long = "k" * 1_000_000
    torch.save({"model": {"w": torch.ones(1)}, long: {long: list(range(100_000))}}, tmp_path / "a.pt")
    checkpoint = vc.open(tmp_path / "a.pt")
    with bounded():
        SafetensorsAdapter().write(checkpoint, tmp_path / "a.safetensors")
        assert vc.open(tmp_path / "a.safetensors").payload == checkpoint.payload


# --- names ---

NAMES = ["", "__metadata__", "a\0b", "vraxion_ckpt/", "vraxion_ckpt/payload/x", "vraxion_ckpt/model/0", "\ud800", "é"]
NAMES += ["a.b", "a/b", "A", "a", "x" * 5000, "$tensor", '"\\\n', "vraxion_ckpt", "vraxion_ckpt/7", "e\u0301"]


@pytest.mark.parametrize("to", WAYS)
def test_any_name_of_a_models_tensor_comes_back_with_its_own_tensor(to, tmp_path):
    model = OrderedDict((name, torch.full((2,), float(i))) for i, name in enumerate(NAMES))
    payload = {"model": model, "x": torch.full((2,), -1.0), "step": 3}
    assert_same(there_and_back(payload, tmp_path, to), payload)
    if to == "safetensors":
        held = load_file(tmp_path / "there")
        plain = {name for name in NAMES if not name.startswith("vraxion_ckpt/")} - {
            "",
            "__metadata__",
            "a\0b",
            "\ud800",
        }
        assert {name for name in held if not name.startswith("vraxion_ckpt/")} == plain
        assert_same({name: held[name] for name in plain}, {name: model[name] for name in plain})


@pytest.mark.parametrize("to", WAYS)
def test_places_that_read_alike_do_not_mix_up_their_tensors(to, tmp_path):
    number = iter(range(1000))

    def new() -> torch.Tensor:
        return torch.full((3,), float(next(number)))

    payload = trained()
    payload["model"] |= {
        f"vraxion_ckpt/{place}": new() for place in ("payload/a/b", "optimizer/theta/more", "30", "40")
    }
    payload |= {
        "a": {"b": new(), "b/c": new(), 0: [new()]},
        "a/b": new(),
        "a/b/c": new(),
        "a/0/0": new(),
        "a/0": [new()],
    }
    payload |= {0 * "x" + "k" * 400 + str(i): new() for i in range(3)}
    payload |= {"keys": {0: new(), "0": new(), "": {"": new()}, "/": new()}, "model/3": new()}
    payload["optim"] |= {"theta": {"more": new()}, "group_0": {"lr": new()}, "theta/more": new()}
    payload["optim"]["state"][0] |= {"more": new(), "a/b": new(), "a": {"b": new()}}
    payload["optim"]["param_groups"][0] |= {"x": new(), "lr": new()}
    assert exact(there_and_back(payload, tmp_path, to)) == exact(payload)
    assert next(number) > 20


def test_a_name_of_the_optimizers_that_is_no_plain_text_keeps_its_state(tmp_path):
    names = ["$tensor", "a\ud800", "", "x/y"]
    model = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    state = {i: {"m": torch.full((2,), 10.0 + i), "$v": (i, None), "\udc00": 1.5} for i in range(4)}
    group = {"params": [0, 1, 2, 3], "$lr": 1, "\ud800": 2}
    payload = {"model": model, "optim": {"state": state, "param_groups": [group]}, "param_names": names}
    assert exact(there_and_back(payload, tmp_path, "safetensors")) == exact(payload)
    assert list(vc.open(tmp_path / "there").optimizer.state) == names


# --- ties ---


def places(*tensors: torch.Tensor) -> int:
    """Count the distinct memory ranges of some tensors."""
    return len({tensor.data_ptr() for tensor in tensors})


@pytest.mark.parametrize("to", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
@pytest.mark.parametrize("kind", ["plain", "part", "turned"])
def test_what_is_one_tensor_stays_one_across_model_optimizer_and_payload(dtype, kind, to, tmp_path):
    shape = {"plain": (3, 3), "part": (9, 3), "turned": (3, 3)}[kind]
    base = of_bits(dtype, *shape, seed=5)
    tied = {"plain": base, "part": base[3:6], "turned": base.T}[kind]
    payload = trained(best={"a": [tied], "b": tied}, odd=torch.ones(5, dtype=torch.uint8))
    payload["model"] |= {"head.experts.0.weight": tied, "head.experts.1.weight": torch.zeros(3, 3, dtype=dtype)}
    payload["model"] |= {"decoder": tied, "bias": nn.Parameter(tied)}
    for i in (1, 2):
        payload["optim"]["state"][i] = {"exp_avg": tied.clone()}
    payload["optim"]["state"][1] = {"exp_avg": tied}
    payload["optim"]["tied"] = tied
    back = there_and_back(payload, tmp_path, to)
    assert exact(back) == exact(payload)
    read = vc.open(tmp_path / "there").payload["best"]
    assert read["a"][0] is read["b"]
    for found in (back, payload):
        model = found["model"]
        assert isinstance(model["bias"], nn.Parameter)
        names = [model["head.experts.0.weight"], model["decoder"], model["bias"], found["best"]["a"][0]]
        names += [found["best"]["b"], found["optim"]["state"][1]["exp_avg"], found["optim"]["tied"]]
        assert places(*names) == 1
        assert places(*names, model["head.experts.1.weight"], found["optim"]["state"][2]["exp_avg"]) == 3
    files = [tmp_path / "there"] if to == "safetensors" else [*(tmp_path / "there").glob("*.safetensors")]
    content = bytes(exact(tied)[4])
    assert sum(file.read_bytes().count(content) for file in files) == 2  # itself, and the clone


def test_one_memory_in_two_dtypes_is_a_declared_loss_and_not_mixed_up(tmp_path):
    """No torch file holds this, but a transform can make it."""
    numbers = torch.arange(4.0)
    checkpoint = vc.Checkpoint({"a": numbers, "b": numbers.view(torch.int32), "c": numbers})
    adapter = SafetensorsAdapter()
    assert [loss.what for loss in adapter.losses(checkpoint)] == ["the shared memory of model.a and model.b"]
    adapter.write(checkpoint, tmp_path / "x.safetensors")
    assert exact(vc.open(tmp_path / "x.safetensors").state_dict()) == exact(checkpoint.state_dict())


def overlapping(kind: str) -> dict[str, Any]:
    memory = torch.arange(16.0)
    square, wave = memory.view(4, 4), torch.tensor([1 + 2j, 3 - 4j])
    payload = trained()
    if kind == "parts of one":
        payload["model"] |= {"a": memory[:10], "b": memory[6:]}
    elif kind == "whole and part":
        payload["model"] |= {"a": memory, "b": memory[4:8]}
    elif kind == "same start":
        payload["model"] |= {"a": memory, "b": memory[:8]}
    elif kind == "other shape":
        payload["model"] |= {"a": memory, "b": square}
    elif kind == "turned":
        payload["model"] |= {"a": square, "b": square.T}
    elif kind == "conjugate":
        payload["model"] |= {"a": wave, "b": wave.conj()}
    elif kind == "model and payload":
        payload["model"]["a"], payload["b"] = memory, [{"x": memory[1:]}]
    elif kind == "model and optimizer":
        payload["model"]["theta"] = memory[:3]
        payload["optim"]["state"][0]["exp_avg"] = memory[1:4]
    elif kind == "options and extra":
        payload["optim"]["param_groups"][0]["lr"], payload["optim"]["x"] = memory[:2], memory[1:2]
    elif kind == "metadata":
        payload["model"] = OrderedDict(payload["model"], a=memory)
        payload["model"]._metadata = OrderedDict({"": {"b": memory[3:]}})
    return payload


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("parts of one", ("model.a", "model.b")),
        ("whole and part", ("model.a", "model.b")),
        ("same start", ("model.a", "model.b")),
        ("other shape", ("model.a", "model.b")),
        ("turned", ("model.a", "model.b")),
        ("conjugate", ("model.a", "model.b")),
        ("model and payload", ("model.a", "payload.b.0.x")),
        ("model and optimizer", ("model.theta", "optimizer.theta.exp_avg")),
        ("options and extra", ("lr", "x")),
        ("metadata", ("model.a", "metadata..b")),
    ],
)
def test_tensors_that_share_a_part_of_their_memory_are_a_declared_loss(kind, names, tmp_path):
    payload = overlapping(kind)
    torch.save(payload, tmp_path / "source.pt")
    losses = vc.inspect(tmp_path / "source.pt").losses["safetensors"]
    assert len(losses) == 1
    assert all(name in losses[0].what for name in names)
    with pytest.raises(LossError, match="shared memory"):
        vc.convert(tmp_path / "source.pt", tmp_path / "refused.safetensors")
    assert not (tmp_path / "refused.safetensors").exists()
    with pytest.warns(vc.CkptWarning, match="each is written separately"):
        back = there_and_back(payload, tmp_path, "safetensors", losses="warn")
    assert exact(back) == exact(payload)


def test_what_an_optimizer_without_names_shares_is_told_too(tmp_path):
    memory = torch.arange(3.0)
    model = {"a": torch.zeros(3), "b": torch.zeros(3)}
    state = {0: {"exp_avg": memory[:2], "exp_avg_sq": memory[1:]}}
    torch.save({"model": model, "optim": {"state": state, "param_groups": [{"params": [0]}]}}, tmp_path / "a.pt")
    found = vc.inspect(tmp_path / "a.pt")
    assert found.optimizer is not None
    assert not found.optimizer.bound
    assert "exp_avg_sq" in found.losses["safetensors"][0].what


def test_parts_of_one_memory_that_do_not_overlap_are_no_loss(tmp_path):
    stacked = torch.randn(2, 2, 2)
    payload = trained(between=torch.arange(8.0)[2:6])
    payload["model"] |= {f"head.experts.{i}.weight": stacked[i] for i in range(2)}
    payload["model"]["nothing"] = stacked[0, :0]
    torch.save(payload, tmp_path / "source.pt")
    assert vc.inspect(tmp_path / "source.pt").losses["safetensors"] == ()
    assert exact(there_and_back(payload, tmp_path, "safetensors")) == exact(payload)


# --- optimizers, heads ---


@pytest.mark.parametrize("to", WAYS)
def test_two_groups_an_lr_that_is_a_tensor_and_entries_that_nobody_knows_come_back(to, tmp_path):
    payload = trained()
    first, second = payload["param_names"][1:], payload["param_names"][:1]
    old = payload["optim"]["state"]
    payload["optim"] = {
        "note": ["x", (1,)],
        "param_groups": [
            {"params": [0, 1, 2], "lr": torch.tensor(0.1), "param_names": first, "foreach": None},
            {"weight_decay": 0, "params": [3], "param_names": second, "lr": torch.tensor(0.1, dtype=torch.float64)},
        ],
        "state": {3: old[0], 0: old[1], 2: {**old[3], "history": [torch.ones(2), None]}},
    }
    found = there_and_back(payload, tmp_path, to)
    assert found["optim"].keys() == payload["optim"].keys()
    for key in ("note", "param_groups", "state"):  # no format keeps the order of these three
        assert exact(found["optim"][key]) == exact(payload["optim"][key])
    del found["optim"], payload["optim"]
    assert exact(found) == exact(payload)


@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_head_stays_where_it_stands(position, tmp_path):
    payload = trained()
    head = {name: tensor for name, tensor in payload["model"].items() if name.startswith("head.")}
    core = [(name, tensor) for name, tensor in payload["model"].items() if name not in head]
    payload["model"] = OrderedDict([*core[:position], *head.items(), *core[position:]])
    payload["param_names"] = [name for name in payload["model"] if name != "router_map"]
    del payload["optim"]
    assert exact(there_and_back(payload, tmp_path, "safetensors")) == exact(payload)
    assert vc.open(tmp_path / "there").head.position == position


@pytest.mark.parametrize(
    "payload",
    [
        {"model": {"w": torch.ones(2)}, "num_experts": 5, "step": 3},
        {"step": 3, "num_experts": 2, "model": trained()["model"], "optim": None},
        {"model": trained()["model"]},
        trained()["model"],
        OrderedDict(trained()["model"]),
    ],
    ids=["without a head", "with one", "no more than the model", "a bare dict", "a bare state dict"],
)
def test_a_payload_is_spelt_as_it_was(payload, tmp_path):
    assert exact(there_and_back(payload, tmp_path, "safetensors")) == exact(payload)


def test_names_that_were_given_for_an_optimizer_are_kept(tmp_path):
    """Moments of equal shape could belong to either parameter, so the names given once must be recorded."""
    payload = trained()
    names = payload.pop("param_names")
    order = [names[i] for i in (2, 1, 0, 3)]
    states = payload["optim"]["state"]
    payload["optim"]["state"] = {i: states[names.index(name)] for i, name in enumerate(order)}
    torch.save(payload, tmp_path / "source.pt")
    vc.convert(tmp_path / "source.pt", tmp_path / "a.safetensors", param_names=order)
    vc.convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    for path in ("a.safetensors", "b.pt"):
        optimizer = vc.open(tmp_path / path).optimizer
        assert optimizer.params == order
        assert exact(optimizer.state[names[0]]) == exact(states[0])
    with pytest.raises(vc.CkptError, match="the optimizer already has parameter names"):
        vc.open(tmp_path / "a.safetensors", param_names=order)


# --- invalid documents ---


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def write_header(path: Path, raw: bytes) -> None:
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def rewrite_text(path: Path, change: Callable[[str], str]) -> None:
    """Change the text of the document in a file's header."""
    header = header_of(path)
    header["__metadata__"]["vraxion_ckpt"] = change(header["__metadata__"]["vraxion_ckpt"])
    write_header(path, json.dumps(header).encode())


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Store what `change` returns instead of the document; the document itself if that is None."""

    def changed(text: str) -> str:
        value = json.loads(text)
        new = change(value)
        return json.dumps(value if new is None else new)

    if path.is_file():
        return rewrite_text(path, changed)
    index = json.loads((path / INDEX).read_text())
    index["metadata"]["vraxion_ckpt"] = json.loads(changed(json.dumps(index["metadata"]["vraxion_ckpt"])))
    (path / INDEX).write_text(json.dumps(index))
    return None


SAME_HASH = [[number * (2**61 - 1), 0] for number in range(1, 3000)]


def put(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set the value at a place like ``optimizer.groups.0.keys``."""

    def change(document: dict[str, Any]) -> None:
        *way, last = place.split(".")
        at: Any = document
        for key in way:
            at = at[int(key)] if isinstance(at, list) else at[key]
        at[int(last) if isinstance(at, list) else last] = value

    return change


def drop(place: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *way, last = place.split(".")
        at: Any = document
        for key in way:
            at = at[int(key)] if isinstance(at, list) else at[key]
        del at[int(last) if isinstance(at, list) else last]

    return change


WAVE = {"dtype": "complex128", "shape": [2]}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in both forms, with something of every kind in its payload."""
    folder = tmp_path_factory.mktemp("sound")
    wave = torch.tensor([1j, 2], dtype=torch.complex128)
    payload = trained(wave=wave, x=(1, {2: 3}), weight=nn.Parameter(torch.ones(2)), nan=float("nan"))
    payload["many"] = OrderedDict(a=torch.ones(2, dtype=torch.uint8))
    torch.save(payload, folder / "source.pt")
    for name, to in (("file", "safetensors"), ("folder", "safetensors:max_shard_size=1KB")):
        vc.convert(folder / "source.pt", folder / name, to=to, transforms=["mitosis_split:parent=0,addresses=[0]"])
    return folder


def test_a_document_is_what_these_tests_believe_it_to_be(sound):
    """Check that the changes below change the intended entries."""
    document = json.loads(header_of(sound / "file")["__metadata__"]["vraxion_ckpt"])
    assert document["model"][0] == "theta"
    assert document["payload"]["wave"] == {"$tensor": "vraxion_ckpt/payload/wave", **WAVE}
    assert document["payload"]["x"] == {"$tuple": [1, {"$dict": [[2, 3]]}]}
    assert document["payload"]["weight"] == {"$tensor": "vraxion_ckpt/payload/weight", "parameter": True}
    assert document["payload"]["nan"] == {"$float": "7ff8000000000000"}
    assert document["payload"]["many"] == {"$ordered": [["a", {"$tensor": "vraxion_ckpt/payload/many/a"}]]}
    assert document["optimizer"]["state"]["theta"]["exp_avg"] == {"$tensor": "vraxion_ckpt/optimizer/theta/exp_avg"}
    assert document["metadata"] is None
    assert document["extras"]["history"][0]["name"] == "mitosis_split"
    index = json.loads((sound / "folder" / INDEX).read_text())
    assert index["metadata"]["vraxion_ckpt"] == document


OURS = "[vraxion_ckpt"
Change = Callable[[dict[str, Any]], Any]
DOCUMENTS: dict[str, tuple[Change, type[CkptError], str]] = {
    # the whole document
    "a list": (lambda d: [d], InconsistentError, OURS),
    "text": (lambda _: "x", InconsistentError, OURS),
    "a number": (lambda _: 0, InconsistentError, OURS),
    "empty": (lambda _: {}, InconsistentError, OURS),
    "further entry": (put("more", 1), InconsistentError, "[vraxion_ckpt.more]"),
    "version 2": (put("version", 2), UnsupportedError, "newer vraxion_ckpt (version 2)"),
    "version 0": (put("version", 0), InconsistentError, "[vraxion_ckpt.version]"),
    "version as text": (put("version", "1"), InconsistentError, "[vraxion_ckpt.version]"),
    "version null": (put("version", None), InconsistentError, "[vraxion_ckpt.version]"),
    "no version": (drop("version"), InconsistentError, "[vraxion_ckpt.version]"),
    # the model
    "no model": (drop("model"), InconsistentError, "[vraxion_ckpt.model]"),
    "model an object": (put("model", {}), InconsistentError, "[vraxion_ckpt.model]"),
    "model's entry a number": (put("model.0", 3), InconsistentError, "[vraxion_ckpt.model.0"),
    "model's entry too short": (put("model.0", ["theta"]), InconsistentError, "[vraxion_ckpt.model.0"),
    "model's entry too long": (put("model.0", ["theta", 1, 2]), InconsistentError, "[vraxion_ckpt.model.0"),
    "model's entry no tensor": (put("model.0", ["theta", 1.5]), InconsistentError, "[model.theta]: is not a tensor"),
    "model's entry a list": (put("model.0", ["theta", [{"$tensor": "theta"}]]), InconsistentError, "is not a tensor"),
    "model's tensor missing": (put("model.0", "thetA"), InconsistentError, "'thetA', which does not exist"),
    "model's tensor twice": (put("model.1", "theta"), InconsistentError, "[model.theta]"),
    "model's tensor left out": (drop("model.0"), InconsistentError, "[theta]: is a tensor that the metadata does not"),
    "head torn apart": (lambda d: d["model"].insert(0, d["model"].pop(3)), InconsistentError, "are not consecutive"),
    "metadata a list": (put("metadata", []), InconsistentError, OURS),
    "metadata of no dicts": (put("metadata", {"": 1}), InconsistentError, "[model._metadata]"),
    # the payload
    "no payload": (drop("payload"), InconsistentError, "[vraxion_ckpt.payload]"),
    "payload null": (put("payload", None), InconsistentError, OURS),
    "payload a list": (put("payload", []), InconsistentError, OURS),
    "payload ordered": (put("payload", {"$ordered": []}), InconsistentError, OURS),
    "param_names text": (put("param_names", "theta"), InconsistentError, "[vraxion_ckpt.param_names]"),
    "param_names numbers": (put("param_names", [1]), InconsistentError, "[vraxion_ckpt.param_names"),
    # the optimizer
    "optimizer a list": (put("optimizer", []), InconsistentError, "[vraxion_ckpt.optimizer]"),
    "optimizer without state": (drop("optimizer.state"), InconsistentError, "[vraxion_ckpt.optimizer.state]"),
    "optimizer with more": (put("optimizer.more", 1), InconsistentError, "[vraxion_ckpt.optimizer.more]"),
    "optimizer gone": (put("optimizer", None), InconsistentError, "is a tensor that the metadata does not list"),
    "groups an object": (put("optimizer.groups", {}), InconsistentError, "[vraxion_ckpt.optimizer.groups]"),
    "group's params numbers": (put("optimizer.groups.0.params", [0]), InconsistentError, "groups.0.params"),
    "group's params twice": (put("optimizer.groups.0.params.0", "last"), InconsistentError, "lists last twice"),
    "group's params unknown": (put("optimizer.groups.0.params.0", "x"), InconsistentError, "in no param group"),
    "group's keys text": (put("optimizer.groups.0.keys", "lr"), InconsistentError, "groups.0.keys"),
    "group's options a list": (put("optimizer.groups.0.options", []), InconsistentError, "must be a dict without"),
    "group's options with params": (
        put("optimizer.groups.0.options.params", [1]),
        InconsistentError,
        "must be a dict without",
    ),
    "state a list": (put("optimizer.state", []), InconsistentError, "[optimizer]"),
    "state of no dicts": (put("optimizer.state.theta", 1), InconsistentError, "a dict for each name"),
    "state by number": (put("optimizer.state", {"$dict": [[0, {}]]}), InconsistentError, "a dict for each name"),
    "state of another shape": (
        put("optimizer.state.theta.exp_avg", {"$tensor": "last"}),
        InconsistentError,
        "is a tensor that the metadata does not list",
    ),
    "state of two mixed up": (
        lambda d: d["optimizer"]["state"].update(
            {"theta": d["optimizer"]["state"]["last"], "last": d["optimizer"]["state"]["theta"]}
        ),
        InconsistentError,
        "theta: slot exp_avg has shape [2], its parameter [3]",
    ),
    "extra a list": (put("optimizer.extra", []), InconsistentError, "[optimizer]"),
    "extra hides the state": (put("optimizer.extra", {"state": {}}), InconsistentError, "must not have"),
    # extras
    "extras a list": (put("extras", [1]), InconsistentError, OURS),
    "extras with more": (put("extras.more", 1), InconsistentError, "[vraxion_ckpt.more]"),
    "extras of version 2": (put("extras.version", 2), UnsupportedError, "newer"),
    "extras with a tensor": (put("extras.dialects", {"x": {"$tensor": "theta"}}), InconsistentError, "plain JSON"),
    "history a number": (put("extras.history", 1), InconsistentError, "[vraxion_ckpt.history]"),
    "rows of nobody": (put("extras.lifecycle", {"a": {}}), InconsistentError, "[vraxion_ckpt.lifecycle"),
    "rows too few": (put("extras.lifecycle", {"0": {}}), InconsistentError, "lifecycle rows are for expert 0"),
    "rows too many": (put("extras.lifecycle.3", {}), InconsistentError, "lifecycle rows are for experts 0, 1, 2, 3"),
    "row's step as text": (put("extras.lifecycle.0", {"created_step": "x"}), InconsistentError, "created_step"),
    "deleted as text": (put("extras.deleted", "1"), InconsistentError, "[vraxion_ckpt.deleted"),
    "deleted lives": (put("extras.deleted", [1]), InconsistentError, "both live and deleted"),
    "plan of no parts": (put("extras.plan", {}), InconsistentError, "[vraxion_ckpt.plan"),
    "dialect unknown": (put("extras.dialects.safetensors", 1), InconsistentError, "dialects.safetensors"),
    # tensors
    "tensor missing": (
        put("payload.wave.$tensor", "vraxion_ckpt/payload/y"),
        InconsistentError,
        "[payload.wave]: refers to the tensor 'vraxion_ckpt/payload/y', which does not exist",
    ),
    "tensor's name a number": (put("payload.wave.$tensor", 3), InconsistentError, "[payload.wave]"),
    "tensor's name a list": (put("payload.wave.$tensor", ["a"]), InconsistentError, "[payload.wave]"),
    "tensor's name null": (put("payload.wave.$tensor", None), InconsistentError, "[payload.wave]"),
    "tensor unknown": (drop("payload.wave"), InconsistentError, "[vraxion_ckpt/payload/wave]: is a tensor that"),
    "tensor with more": (put("payload.wave.more", 1), InconsistentError, "further entries"),
    "tensor and tuple": (put("payload.wave.$tuple", []), InconsistentError, "[payload.wave]"),
    "dtype unknown": (
        put("payload.wave.dtype", "float99"),
        InconsistentError,
        "[payload.wave]: is not a valid $tensor entry",
    ),
    "dtype no dtype": (
        put("payload.wave.dtype", "load"),
        InconsistentError,
        "[payload.wave]: is not a valid $tensor entry",
    ),
    "dtype a number": (put("payload.wave.dtype", 5), InconsistentError, "[payload.wave]"),
    "dtype a list": (put("payload.wave.dtype", []), InconsistentError, "[payload.wave]"),
    "dtype narrower": (put("payload.wave.dtype", "complex64"), InconsistentError, "[payload.wave]"),
    "dtype wider": (put("payload.wave", {"$tensor": "vraxion_ckpt/payload/many/a", **WAVE}), InconsistentError, "wave"),
    "dtype quantised": (
        put("payload.wave", {"$tensor": "vraxion_ckpt/payload/wave", "dtype": "qint8", "shape": [32]}),
        InconsistentError,
        "not stored as bytes",
    ),
    "dtype left out": (drop("payload.wave.dtype"), InconsistentError, "[payload.wave]"),
    "dtype of no bytes": (
        put("model.0", ["theta", {"$tensor": "theta", "dtype": "int32", "shape": [3]}]),
        InconsistentError,
        "[model.theta]: is not a valid $tensor entry: it is not stored as bytes",
    ),
    "shape left out": (drop("payload.wave.shape"), InconsistentError, "[payload.wave]"),
    "shape too small": (put("payload.wave.shape", [1]), InconsistentError, "[payload.wave]"),
    "shape too large": (put("payload.wave.shape", [2, 2]), InconsistentError, "[payload.wave]"),
    "shape to be guessed": (put("payload.wave.shape", [-1]), InconsistentError, "its shape is not valid"),
    "shape of bools": (put("payload.wave.shape", [2, True]), InconsistentError, "its shape is not valid"),
    "shape of floats": (put("payload.wave.shape", [2.0]), InconsistentError, "its shape is not valid"),
    "shape a number": (put("payload.wave.shape", 2), InconsistentError, "its shape is not valid"),
    "shape absurd": (put("payload.wave.shape", [0, 2**40, 2**40]), InconsistentError, "its shape is not valid"),
    "shape of a million": (put("payload.wave.shape", [2] + [1] * 10**6), InconsistentError, "its shape is not valid"),
    "parameter a number": (put("payload.weight.parameter", 1), InconsistentError, "true or false"),
    "parameter null": (put("payload.weight.parameter", None), InconsistentError, "true or false"),
    "gradient of whole numbers": (
        put("payload.many", {"$tensor": "vraxion_ckpt/payload/many/a", "requires_grad": True}),
        InconsistentError,
        "[payload.many]: is not a valid $tensor entry",
    ),
    "gradient as text": (
        put("payload.many", {"$tensor": "vraxion_ckpt/payload/many/a", "requires_grad": "no"}),
        InconsistentError,
        "true or false",
    ),
    # other kinds of entries
    "kind unknown": (put("payload.x", {"$bag": [1]}), InconsistentError, "[payload.x]: is not a valid $bag entry"),
    "kind of no name": (put("payload.x", {"$": [1]}), InconsistentError, "[payload.x]"),
    "kind beside a key": (put("payload.x", {"a": 1, "$tuple": []}), InconsistentError, "[payload.x]"),
    "tuple of text": (put("payload.x", {"$tuple": "abc"}), InconsistentError, "[payload.x]"),
    "tuple of an object": (put("payload.x", {"$tuple": {"a": 1}}), InconsistentError, "[payload.x]"),
    "float of text": (put("payload.nan", {"$float": "nan"}), InconsistentError, "[payload.nan]"),
    "float of five bytes": (put("payload.nan", {"$float": "7ff8000000"}), InconsistentError, "[payload.nan]"),
    "float a number": (put("payload.nan", {"$float": 1.5}), InconsistentError, "[payload.nan]"),
    "dict an object": (put("payload.x", {"$dict": {"a": 1}}), InconsistentError, "[payload.x]"),
    "dict of text": (put("payload.x", {"$dict": ["ab"]}), InconsistentError, "[payload.x]"),
    "dict of keys alone": (put("payload.x", {"$dict": [["a"]]}), InconsistentError, "[payload.x]"),
    "dict with a key twice": (put("payload.x", {"$dict": [[1, 2], [1, 3]]}), InconsistentError, "occurs twice"),
    "dict with equal keys": (put("payload.x", {"$dict": [[1, 2], [True, 3]]}), InconsistentError, "occurs twice"),
    "dict with a tensor as key": (put("payload.x", {"$dict": [[{"$tensor": "theta"}, 2]]}), InconsistentError, "a key"),
    "dict with keys of one hash": (put("payload.x", {"$dict": SAME_HASH}), LimitError, "hashes are the same"),
    "set with a list": (put("payload.x", {"$set": [[]]}), InconsistentError, "[payload.x]"),
    "set with an entry twice": (put("payload.x", {"$set": [1, 1.0]}), InconsistentError, "occurs twice"),
    "set of text": (put("payload.x", {"$set": "ab"}), InconsistentError, "[payload.x]"),
    "counter of a list": (put("payload.x", {"$counter": [1]}), InconsistentError, "[payload.x]"),
    "bytes of text": (put("payload.x", {"$bytes": "xy"}), InconsistentError, "[payload.x]"),
    "bytes of a number": (put("payload.x", {"$bytes": 5}), InconsistentError, "[payload.x]"),
    "bytes of a missing tensor": (put("payload.x", {"$bytes": ["none"]}), InconsistentError, "does not exist"),
    "bytes of two tensors": (put("payload.x", {"$bytes": ["theta", "theta"]}), InconsistentError, "[payload.x]"),
    "bytes of floats": (put("payload.x", {"$bytes": ["theta"]}), InconsistentError, "not stored as bytes"),
    "complex of one": (put("payload.x", {"$complex": [1.0]}), InconsistentError, "[payload.x]"),
    "complex of integers": (put("payload.x", {"$complex": [1, 2]}), InconsistentError, "[payload.x]"),
    "size of text": (put("payload.x", {"$size": ["a"]}), InconsistentError, "[payload.x]"),
    "torch's unknown dtype": (put("payload.x", {"$torch": ["dtype", "float7"]}), InconsistentError, "no dtype"),
    "torch's function": (put("payload.x", {"$torch": ["dtype", "load"]}), InconsistentError, "no dtype"),
    "torch's unknown kind": (put("payload.x", {"$torch": ["Tensor", "x"]}), InconsistentError, "[payload.x]"),
    "torch's device": (put("payload.x", {"$torch": ["device", "cuda:999"]}), InconsistentError, "no device"),
    "number of objects": (put("payload.x", {"$number": ["|O", "00"]}), InconsistentError, "is not carried"),
    "number of too few bytes": (put("payload.x", {"$number": ["<f8", "00"]}), InconsistentError, "8 bytes"),
    "number of endless text": (put("payload.x", {"$number": ["<U9999999999", ""]}), InconsistentError, "not carried"),
    "array of objects": (put("payload.x", {"$array": ["|O", [1], False, "00"]}), InconsistentError, "is not carried"),
    "array too large": (put("payload.x", {"$array": ["|u1", [2**60, 0], False, ""]}), InconsistentError, "too large"),
    "array of other size": (put("payload.x", {"$array": ["|u1", [2], False, "00"]}), InconsistentError, "do not fit"),
    "array of no order": (put("payload.x", {"$array": ["|u1", [1], None, "00"]}), InconsistentError, "do not fit"),
    "array without shape": (put("payload.x", {"$array": ["|u1", 1, False, "00"]}), InconsistentError, "[payload.x]"),
    "dict with a list as key": (put("payload.x", {"$dict": [[[], 2]]}), InconsistentError, "[payload.x]"),
    "ordered with more": (put("payload.many.more", 1), InconsistentError, "[payload.many]"),
    "attributes a list": (put("payload.many.attributes", [["a", 1]]), InconsistentError, "[payload.many]"),
    "attributes that hide a method": (put("payload.many.attributes", {"items": 1}), InconsistentError, "attributes"),
    "attributes by number": (put("payload.many.attributes", {"$dict": [[1, 2]]}), InconsistentError, "[payload.many]"),
    # too large
    **{
        f"nested {depth} deep in {kind} at {place}": (
            put(place, json.loads(around[0] * depth + around[1] * depth)),
            LimitError,
            "nested deeper than 100",
        )
        for place in ("payload.x", "optimizer.extra.x", "optimizer.groups.0.options.x", "optimizer.state.theta.x")
        for depth, kind, around in (
            (100, "lists", ("[", "]")),
            (101, "tuples", ('{"$tuple":[', "]}")),
            (101, "dicts", ('{"a":[', "]}")),
            (600, "lists", ("[", "]")),
        )
    },
}


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize(("change", "error", "says"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_document_that_is_not_ours_or_does_not_fit_is_refused(change, error, says, form, sound, tmp_path):
    source = copied(sound / form, tmp_path)
    rewrite(source, change)
    with pytest.raises(CkptError) as caught:
        vc.open(source)
    assert type(caught.value) is error, caught.value
    assert says in str(caught.value)
    assert caught.value.path == source
    assert len(str(caught.value)) < 1000


def copied(path: Path, folder: Path) -> Path:
    target = folder / path.name
    if path.is_dir():
        shutil.copytree(path, target)
    else:
        shutil.copy(path, target)
    return target


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_document_that_is_written_again_is_believed(form, sound, tmp_path):
    """Check that the documents above are rejected because of the change, and not because they were rewritten."""
    source = copied(sound / form, tmp_path)
    rewrite(source, lambda _: None)
    assert exact(vc.open(source).payload) == exact(vc.open(sound / form).payload)
    for change in (
        put("payload.x", json.loads("[" * 99 + "]" * 99)),
        put("payload.many.attributes", {"note": 1}),
        put("payload.nan", {"$float": "7ff0000000000001"}),
    ):
        rewrite(source, change)
        vc.open(source)


TEXTS: dict[str, tuple[Callable[[str], str], type[CkptError], str]] = {
    "no text": (lambda _: "", InconsistentError, "does not parse: is not JSON"),
    "not JSON": (lambda _: "hello", InconsistentError, "does not parse: is not JSON"),
    "null": (lambda _: "null", InconsistentError, "[vraxion_ckpt"),
    "truncated": (lambda text: text[:-1], InconsistentError, "does not parse: is not JSON"),
    "more than JSON": (lambda text: text + "{}", InconsistentError, "does not parse: is not JSON"),
    "NaN": (lambda text: text.replace('"step":7', '"step":NaN'), InconsistentError, "NaN is not a JSON number"),
    "infinite": (
        lambda text: text.replace('"step":7', '"step":1e999'),
        InconsistentError,
        "1e999 is not a JSON number",
    ),
    "5,000 digits": (lambda text: text.replace('"step":7', f'"step":{"7" * 5000}'), InconsistentError, "parse"),
    "key twice": (lambda text: text.replace('"step":7', '"step":6,"step":7'), InconsistentError, "key occurs twice"),
    "key twice, spelt \\u0073": (
        lambda text: text.replace('"step":7', '"\\u0073tep":6,"step":7'),
        InconsistentError,
        "does not parse: the key occurs twice",
    ),
    "nested 100,000 deep": (lambda _: "[" * 100_000 + "]" * 100_000, LimitError, "nested too deeply"),
    "six million lists": (lambda _: "[" + "[]," * 3_000_000 + "[]]", LimitError, "5000000 values"),
}


@pytest.mark.parametrize(("change", "error", "says"), TEXTS.values(), ids=TEXTS)
def test_a_document_that_does_not_parse_is_refused(change, error, says, sound, tmp_path, cli):
    source = copied(sound / "file", tmp_path)
    before = source.read_bytes()
    rewrite_text(source, change)
    assert source.read_bytes() != before
    code, said = cli("convert", source, tmp_path / "out.pt")
    assert code == error.exit_code
    assert says in said
    assert len(said) < 1000
    assert not (tmp_path / "out.pt").exists()


def test_values_that_only_look_few_are_counted_where_they_are_parsed(sound, tmp_path):
    """In the header, commas in the text of a document can be escaped."""
    source = copied(sound / "file", tmp_path)
    header = header_of(source)
    header["__metadata__"]["vraxion_ckpt"] = "@"
    write_header(source, json.dumps(header).encode().replace(b'"@"', b'"[0' + b"\\u002c0" * 5_000_001 + b']"'))
    with pytest.raises(LimitError, match="5000000 values"):
        vc.open(source)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_training_state_without_its_document_is_no_state_dict(form, sound, tmp_path):
    source = copied(sound / form, tmp_path)
    if form == "folder":
        index = json.loads((source / INDEX).read_text())
        del index["metadata"]["vraxion_ckpt"]
        (source / INDEX).write_text(json.dumps(index))
    else:
        header = header_of(source)
        del header["__metadata__"]
        write_header(source, json.dumps(header).encode())
    with pytest.raises(InconsistentError, match="the metadata that describes it was lost"):
        vc.open(source)


PIECES: list[Any] = [None, True, 0, -1, 1.5, 2**70, "", "theta", "x" * 300, [], {}, [[]], ["theta", 3], {"a": None}]
PIECES += [{"$tensor": "theta"}, {"$tuple": [1]}, {"$dict": [[1, 2]]}, {"$ordered": []}, {"$float": "7ff8000000000000"}]


def walk(value: Any) -> list[Any]:
    """List all containers in a value, including itself, such that small ones are as frequent as large ones."""
    found = [value]
    for entry in value.values() if isinstance(value, dict) else value:
        if isinstance(entry, dict | list):
            found += walk(entry)
    return found


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), times=st.integers(1, 4))
def test_no_change_of_a_real_document_is_met_with_anything_but_an_error_of_ours(seed, times, sound, tmp_path_factory):
    dice = random.Random(seed)

    def mutate(document: dict[str, Any]) -> None:
        for _ in range(times):
            containers = walk(document)
            at = dice.choice([container for container in containers if container])
            key = dice.choice(list(at)) if isinstance(at, dict) else dice.randrange(len(at))
            kind = dice.randrange(5)
            if kind == 0:
                del at[key]
            elif kind == 1:
                at[key] = copy.deepcopy(dice.choice(containers))
            elif kind == 2 and isinstance(at, dict):
                at[dice.choice(["$tensor", "$tuple", "$dict", "dtype", "shape", "parameter", "step", "x"])] = at.pop(
                    key
                )
            elif kind == 3 and isinstance(at, list):
                at.insert(key, copy.deepcopy(at[key]))
            else:
                at[key] = copy.deepcopy(dice.choice(PIECES))

    folder = tmp_path_factory.mktemp("mutated")
    source = copied(sound / "file", folder)
    rewrite(source, mutate)
    with bounded():
        try:
            vc.convert(source, folder / "out.pt")
        except PluginError:  # the message of unexpected exceptions
            raise
        except CkptError:
            pass
    shutil.rmtree(folder)
