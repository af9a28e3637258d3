"""Inputs that are odd, hostile or too large, and surroundings that refuse: each ends at once, with its own exit code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import bits, load

import vraxion_ckpt as vc
from vraxion_ckpt.reading import read

# --- tensors whose strides say nothing ---

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.complex64,
    torch.complex128,
)
# Shape and strides; torch calls all of them contiguous, but for the last two.
STRIDED = {
    "one": ((1,), (2,)),
    "one, stride 0": ((1,), (0,)),
    "one, in three dimensions": ((1, 1, 1), (7, 2**40, 0)),
    "no dimension": ((), ()),
    "a row": ((1, 4), (2**40, 1)),
    "a column": ((4, 1), (1, 0)),
    "none": ((0,), (5,)),
    "none, of five": ((0, 5), (3, 7)),
    "none, of so many": ((3, 0), (2**40, 2**41)),
    "every other one": ((3,), (2,)),
    "transposed, with an odd one": ((2, 1, 3), (1, 5, 2)),
}


def strided(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], first: int = 0) -> torch.Tensor:
    """Return a view of six elements of a dtype, the first at an offset."""
    values = torch.arange(1 + first, 9 + first, dtype=torch.float32)
    storage = (values % 2 == 0) if dtype == torch.bool else values.to(dtype)
    return storage.as_strided(shape, strides, 1)


def odd_checkpoint(path: Path, dtype: torch.dtype) -> Path:
    """Write a checkpoint with such tensors everywhere: in the core, in experts, in slots, in the payload."""
    model: dict[str, Any] = {"router_map": torch.tensor([0, 1, 0, 1])}
    for number, (shape, strides) in enumerate(STRIDED.values()):
        model[f"odd.{number}"] = strided(dtype, shape, strides, number)
    for i in range(2):
        model[f"head.experts.{i}.weight"] = torch.randn(3, 2).t()[:1]
        model[f"head.experts.{i}.scale"] = torch.randn(3, 2)[:1, 0]
    names = [name for name in model if name.startswith("head.")]
    state = {
        i: {
            "step": torch.arange(6.0).reshape(3, 2)[:1, 1].squeeze() + 3,
            "exp_avg": torch.randn(3, 2).t()[:1] if name.endswith("weight") else torch.randn(3, 2)[:1, 0],
            "exp_avg_sq": torch.rand(3, 2).t()[:1] if name.endswith("weight") else torch.rand(3, 2)[:1, 0],
        }
        for i, name in enumerate(names)
    }
    group = {"lr": 0.1, "params": list(range(len(names))), "param_names": names}
    ema = {f"{name} {dtype}": strided(dtype, *how) for name, how in STRIDED.items()}
    optimizer = {"state": state, "param_groups": [group]}
    torch.save({"model": model, "optim": optimizer, "step": 3, "num_experts": 2, "ema": ema}, path)
    return path


def tensors_in(value: Any, key: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield key, value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from tensors_in(entry, f"{key}/{name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_with_odd_strides_go_through_every_format_and_back(dtype, tmp_path):
    source = odd_checkpoint(tmp_path / "a.pt", dtype)
    before = dict(tensors_in(load(source)))
    assert {name for name, tensor in before.items() if tensor.is_contiguous() and 1 not in tensor.stride()[-1:]}
    losses = {"modular": "ignore"}
    for to, name in (("safetensors", "b.safetensors"), ("modular", "b/"), ("pt", "b.pt")):
        vc.convert(source, tmp_path / name, to=to, losses=losses.get(to, "raise"), manifest=tmp_path / f"{to}.json")
        vc.convert(tmp_path / name, tmp_path / f"{to}.back.pt")
        after = dict(tensors_in(load(tmp_path / f"{to}.back.pt")))
        for key, tensor in before.items():
            assert (after[key].dtype, after[key].shape) == (tensor.dtype, tensor.shape), (to, key)
            assert bits(after[key]) == bits(tensor), (to, key)
        assert vc.diff(source, tmp_path / name).identical or to == "modular"
        assert vc.check(tmp_path / name, manifest=tmp_path / f"{to}.json").sound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_with_odd_strides_are_looked_at_and_changed(dtype, run_cli, tmp_path):
    source = odd_checkpoint(tmp_path / "a.pt", dtype)
    code, told, _ = run_cli("inspect", source, "--values")
    assert (code, "odd" in told) == (0, True)
    assert run_cli("check", source)[0] == 0
    split = "mitosis_split:parent=0,addresses=[0],noise=0.01"
    assert run_cli("convert", source, tmp_path / "b.pt", "-t", split)[0] == 0
    assert run_cli("diff", source, tmp_path / "b.pt")[0] == 1
    assert run_cli("report", tmp_path / "b.pt", "-o", tmp_path / "b.html", "--against", source)[0] == 0
    assert run_cli("edit", tmp_path / "b.pt", "-t", "prune_merge:merge_into=0")[0] == 0
    assert vc.diff(source, tmp_path / "b.pt").model == ()


def test_one_tensor_under_two_names_stays_one_whatever_its_strides_say(tmp_path):
    memory = torch.arange(6.0)
    model = {"a": memory.as_strided((1, 2), (5, 1)), "b": memory.as_strided((1, 2), (1, 1))}
    torch.save({"model": model}, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    found = read(tmp_path / "b.safetensors").state_dict()
    assert found["a"].data_ptr() == found["b"].data_ptr()
