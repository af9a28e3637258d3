"""Every kind of value that torch loads, and those of numpy, go through all formats, and torch finds the same values."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_values
from support import assert_same, load
from torch import nn
from vraxion_ckpt_adapters.safetensors import SafetensorsAdapter

import vraxion_ckpt as vc
from vraxion_ckpt.errors import UnsafeError, UsageError
from vraxion_ckpt.testing.strategies import plain_values

NUMPY = ["numpy.dtype", "numpy.ndarray", "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar"]
SPLIT = ["single_to_experts", "mitosis_split:parent=0,addresses=[0-2],noise=0"]
WAY = ["b.pt", "c/", "d.safetensors", "e/", "f.safetensors", "g.pt"]


def model() -> dict[str, Any]:
    return {
        "head.single.weight": torch.arange(6.0).reshape(2, 3),
        "head.single.bias": torch.ones(2),
        "router_map": torch.zeros(8, dtype=torch.int64),
    }


def save(folder: Path, **payload: Any) -> Path:
    torch.save({"model": model(), "step": 3, **payload}, folder / "a.pt")
    return folder / "a.pt"


DTYPES = st.one_of(
    numpy_values.boolean_dtypes(),
    numpy_values.integer_dtypes(endianness="<"),
    numpy_values.unsigned_integer_dtypes(endianness="<"),
    numpy_values.floating_dtypes(endianness="<", sizes=(16, 32, 64)),
    numpy_values.complex_number_dtypes(endianness="<", sizes=(64, 128)),
    numpy_values.byte_string_dtypes(min_len=1, max_len=5),
    numpy_values.unicode_string_dtypes(min_len=1, max_len=5, endianness="<"),
    numpy_values.datetime64_dtypes(max_period="s", endianness="<"),
    numpy_values.timedelta64_dtypes(max_period="s", endianness="<"),
)
ARRAYS = numpy_values.arrays(DTYPES, numpy_values.array_shapes(min_dims=0, min_side=0, max_side=4))
OF_NUMPY = st.one_of(
    ARRAYS,
    ARRAYS.map(np.asfortranarray),
    ARRAYS.filter(np.size).map(lambda array: array.ravel()[0]),
    st.integers(0, 9).map(lambda seed: np.random.RandomState(seed).get_state()),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(value=plain_values(), of_numpy=st.lists(OF_NUMPY, max_size=2))
def test_all_values_survive_a_way_through_all_formats(tmp_path_factory, value, of_numpy):
    folder = tmp_path_factory.mktemp("way")
    places = [save(folder, x=value, np=of_numpy), *(f"{folder}/{name}" for name in WAY)]
    for source, target in pairwise(places):
        to = SafetensorsAdapter(max_shard_size=200) if target.endswith("e/") else None
        has_pickles = str(source).endswith((".pt", "c/"))
        vc.convert(source, target, to=to, allow_globals=NUMPY if has_pickles else [])
    there, back = (torch.load(place, weights_only=False) for place in (places[0], places[-1]))
    assert_same(there["x"], back["x"])
    assert_same(there["np"], back["np"])
    if not of_numpy:
        load(places[-1])  # a trainer needs to allow nothing
    assert vc.diff(places[0], places[-1], allow_globals=NUMPY).identical
    shutil.rmtree(folder)


EVERYTHING: dict[str, Any] = {
    "scheduler": {"milestones": Counter({10: 1, 20: 2}), "gamma": 0.1, "last_epoch": 3},
    "sets": [{1, "a", None, (2.5, "b")}, set()],
    "bytes": (b"", b"abc", bytearray(b"x"), bytes(range(256)) * 30),
    "complex": complex(-0.0, 2.5),
    "of torch": [torch.Size([2]), torch.float16, torch.device("cuda", 0), torch.strided, torch.per_tensor_affine],
    "keys": OrderedDict([(1.5, 0), (None, 1), ((1, "a"), 2), (True, 3), (b"k", 4), (torch.int8, 5)]),
}
OF_NUMPY_TOO = {"np_rng": np.random.RandomState(1).get_state(), "losses": [np.float64(0.5)], "best": np.float32(2.5)}


@pytest.mark.parametrize("name", ["a.pt", "c/", "d.safetensors"])
def test_every_command_takes_every_value(tmp_path, name):
    source = save(tmp_path, **EVERYTHING, **OF_NUMPY_TOO)
    place, pickles = tmp_path / name, {} if name == "d.safetensors" else {"allow_globals": NUMPY}
    if place != source:
        vc.convert(source, f"{tmp_path}/{name}", allow_globals=NUMPY)
    assert vc.check(place, **pickles).sound
    json.dumps(vc.inspect(place, values=True, **pickles).as_json())
    json.dumps(vc.report(place, tmp_path / "page.html", **pickles).as_json())
    vc.edit(place, transforms=SPLIT, **pickles)
    found = vc.open(place, **pickles)
    assert found.num_experts == 2
    for key, value in (EVERYTHING | OF_NUMPY_TOO).items():
        assert_same(found.payload[key], value)
    vc.convert(place, tmp_path / "out.pt", **pickles)
    written = torch.load(tmp_path / "out.pt", weights_only=False)
    assert_same({key: written[key] for key in EVERYTHING | OF_NUMPY_TOO}, EVERYTHING | OF_NUMPY_TOO)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({1: 0}, {True: 0}),
        ({1: 0}, {1.0: 0}),
        ({0.0: 0}, {-0.0: 0}),
        ({(1,): 0}, {(True,): 0}),
        (Counter({1: 1}), {1: 1}),
        ({1}, {True}),
        ({1, 2}, {1, 3}),
        (b"a", bytearray(b"a")),
        (0j, -0j),
        (torch.Size([1]), (1,)),
        (torch.float16, torch.float32),
        (torch.device("cuda"), torch.device("cuda", 0)),
        (np.float64(1), 1.0),
        (np.float64(1), np.float32(1)),
        (np.zeros((2, 2)), np.zeros((2, 2), order="F")),
        (np.zeros(2), np.zeros(2, "f4")),
        (np.zeros(2), np.array([0.0, -0.0])),
        (np.zeros((1, 2)), np.zeros(2)),
    ],
)
def test_diff_finds_a_difference_that_python_does_not_see(tmp_path, one, other):
    (tmp_path / "b").mkdir()
    a, b = save(tmp_path, x=one), save(tmp_path / "b", x=other)
    assert vc.diff(a, a, allow_globals=NUMPY).identical
    assert [change.what for change in vc.diff(a, b, allow_globals=NUMPY).payload] == ["changed"]


def test_a_result_does_not_depend_on_the_process(tmp_path):
    """The order of a set of text does."""
    source = save(tmp_path, seen={str(n) for n in range(50)})
    for name in ("pt", "safetensors"):
        results = []
        for seed in "12":
            target = tmp_path / f"{seed}.{name}"
            command = [sys.executable, "-m", "vraxion_ckpt.cli", "-q", "convert", str(source), str(target)]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
            results.append(target.read_bytes())
        assert results[0] == results[1]


def test_a_step_of_numpy_is_known(tmp_path):
    source = save(tmp_path, step=np.int64(7))
    vc.convert(source, f"{tmp_path}/c/", allow_globals=NUMPY, transforms=SPLIT)
    found = vc.open(tmp_path / "c", allow_globals=NUMPY)
    assert (found.step, type(found.payload["step"])) == (7, np.int64)


# --- Entries that the user drops ---


class Config:
    """A class that only the trainer knows."""


@pytest.mark.parametrize("name", ["out.pt", "out/", "out.safetensors"])
def test_what_cannot_be_read_is_dropped_as_a_declared_loss(tmp_path, name):
    source = save(
        tmp_path, args=argparse.Namespace(lr=1), more={"config": Config(), "sparse": torch.eye(2).to_sparse(), "a": 1}
    )
    with pytest.raises(vc.CkptError) as caught:
        vc.convert(source, f"{tmp_path}/{name}")
    keys = re.findall(r"--drop-key (\S+)", caught.value.hint)
    assert keys == ["args", "more.config", "more.sparse"]
    done = vc.convert(source, f"{tmp_path}/{name}", drop_keys=keys)
    assert [str(loss) for loss in done.losses] == [f"{key}: dropped, as asked" for key in keys]
    found = vc.open(tmp_path / name).payload
    assert (found["more"], "args" in found) == ({"a": 1}, False)


@pytest.mark.parametrize("name", ["a.pt", "c/", "d.safetensors"])
def test_an_entry_that_can_be_read_is_dropped_in_every_format(tmp_path, name):
    shared = {"x": 1, "y": 2}
    source = save(
        tmp_path, one=shared, other=shared, items=[{"z": 1}, {"z": 2}], last=(torch.ones(2), {5: 6, "w": torch.ones(3)})
    )
    if name != "a.pt":
        vc.convert(source, f"{tmp_path}/{name}")
    keys = ["one.x", "items[1].z", "last[1].5", "last.1.w"]
    done = vc.edit(tmp_path / name, drop_keys=keys)
    assert [loss.what for loss in done.losses] == keys
    found = vc.open(tmp_path / name).payload
    assert (found["one"], found["other"], found["items"]) == ({"y": 2}, {"x": 1, "y": 2}, [{"z": 1}, {}])
    assert found["last"][1] == {}
    assert vc.check(tmp_path / name).sound


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("nothing", "no such entry"),
        ("model", "no such entry"),
        ("model.router_map", "no such entry"),
        ("weight", "no such entry"),
        ("items[0]", "is an entry of a list"),
        ("items[7].z", "no such entry"),
        ("step.x", "no such entry"),
        ("", "no such entry"),
        ("a.b", "several entries"),
    ],
)
@pytest.mark.parametrize("name", ["a.pt", "c/", "d.safetensors"])
def test_a_key_that_is_no_entry_of_the_payload_is_refused(tmp_path, name, key, match):
    source = save(tmp_path, **{"items": [{"z": 1}], "a.b": 1, "a": {"b": 2}})
    if name != "a.pt":
        vc.convert(source, f"{tmp_path}/{name}", transforms=SPLIT)
    for command in (vc.open, vc.inspect, vc.check, vc.edit):
        with pytest.raises(UsageError, match=match):
            command(tmp_path / name, drop_keys=[key])


def test_an_object_is_never_dropped_from_a_shard(tmp_path):
    vc.convert(save(tmp_path), f"{tmp_path}/c/", transforms=SPLIT)
    router, shard = tmp_path / "c/system/router.state", tmp_path / "c/experts/expert_001.pt"
    for file in (router, shard):
        torch.save({**load(file), "args": Config()}, file)
    assert vc.open(tmp_path / "c", drop_keys=["args"]).num_experts == 2
    with pytest.raises(UnsafeError):
        vc.convert(tmp_path / "c", tmp_path / "out.pt", drop_keys=["args"])


def test_diff_drops_what_either_checkpoint_has(tmp_path):
    source = save(tmp_path, args=Config(), x=1)
    vc.convert(source, tmp_path / "b.pt", drop_keys=["args"])
    assert vc.diff(source, tmp_path / "b.pt", drop_keys=["args"]).identical
    with pytest.raises(UsageError, match="no such entry"):
        vc.diff(source, tmp_path / "b.pt", drop_keys=["args", "y"])


def test_the_command_and_a_recipe_drop_entries(tmp_path):
    source = save(tmp_path, args=Config())
    done = subprocess.run(
        [python(), "-m", "vraxion_ckpt.cli", "convert", source, tmp_path / "b.pt", "--drop-key", "args"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "args: dropped, as asked" in done.stdout
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {{path: {source}, drop_keys: [args]}}\ntargets: [{tmp_path / 'c.pt'}]\n")
    (made,) = vc.run(recipe).results
    assert [loss.what for loss in made.losses] == ["args"]
    assert "args" not in load(tmp_path / "c.pt")


def test_a_multi_step_scheduler_needs_no_option(tmp_path):
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 4])
    source = save(tmp_path, scheduler=scheduler.state_dict())
    vc.convert(source, f"{tmp_path}/c/", transforms=SPLIT)
    vc.convert(tmp_path / "c", tmp_path / "d.safetensors")
    vc.convert(tmp_path / "d.safetensors", tmp_path / "e.pt")
    resumed = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD(layer.parameters(), lr=0.1), [])
    resumed.load_state_dict(load(tmp_path / "e.pt")["scheduler"])
    assert_same(resumed.state_dict(), scheduler.state_dict())
