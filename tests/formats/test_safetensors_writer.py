"""The safetensors library reads what is written, and what it writes is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from vraxion_ckpt.checkpoint.references import ComputedBytes, TensorRef, reference
from vraxion_ckpt.checkpoint.source_files import Sources, StoredBytes
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.errors import CorruptError
from vraxion_ckpt.formats import safetensors_writer
from vraxion_ckpt.formats.safetensors_file import NATIVE_DTYPES, check_safetensors, load_safetensors
from vraxion_ckpt.formats.safetensors_writer import safetensors_size, save_safetensors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors() -> dict[str, torch.Tensor]:
    found = {}
    for name in sorted(NATIVE_DTYPES):
        dtype = getattr(torch, name)
        data = torch.randint(2 if name == "bool" else 256, (60 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
        found |= {name: data, f"{name}.turned": data.view(3, 4, 5).permute(2, 0, 1), f"{name}.slice": data[7:]}
    base = torch.view_as_complex(torch.rand(5, 2))
    views = {"conj": base.conj(), "neg": base.conj().imag, "steps": torch.rand(40)[::3], "empty": torch.empty(0, 3)}
    return found | views | {"scalar": torch.tensor(2.5), "parameter": nn.Parameter(torch.rand(3))}


def check(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = safetensors.torch.load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


@pytest.mark.parametrize("block", [2**24, 64, 8])
def test_the_library_reads_what_is_written(path, monkeypatch, block):
    monkeypatch.setattr(safetensors_writer, "_BLOCK", block)
    expected = tensors()
    save_safetensors(expected, {"a": "é"}, path)

    check(path, expected)
    with safetensors.safe_open(path, framework="torch") as file:
        assert file.metadata() == {"a": "é"}
    assert safetensors_size(expected, {"a": "é"}) == path.stat().st_size


def test_what_is_read_has_the_values_and_is_written_again(path, tmp_path):
    expected = tensors()
    save_safetensors(expected, {}, path)
    sources = Sources()
    found = load_safetensors(path, check_safetensors(path), sources)

    assert {name: bits(ref.read_only_tensor()) for name, ref in found.items()} == {
        n: bits(t) for n, t in expected.items()
    }
    assert [file.parts for file in sources] == [[ref.storage for ref in found.values()]]
    save_safetensors(found, {}, tmp_path / "y.safetensors")
    check(tmp_path / "y.safetensors", expected)
    assert (tmp_path / "y.safetensors").read_bytes() == path.read_bytes()
    assert all(isinstance(ref.storage, StoredBytes) and ref.storage.found_crc is not None for ref in found.values())


def test_views_of_stored_and_computed_tensors_are_written(path, tmp_path):
    save_safetensors({"a": torch.arange(60.0)}, {}, path)
    (stored,) = load_safetensors(path, check_safetensors(path), Sources()).values()
    computed = ComputedBytes(240, lambda: torch.arange(60.0))
    refs = {}
    for name, storage in [("stored", stored.storage), ("computed", computed)]:
        refs[f"{name}.slice"] = TensorRef(storage, "float32", (10,), (1,), 5)
        refs[f"{name}.turned"] = TensorRef(storage, "float32", (12, 5), (1, 12))
    save_safetensors(refs, {}, tmp_path / "y.safetensors")

    check(tmp_path / "y.safetensors", {name: ref.read_only_tensor() for name, ref in refs.items()})


def test_tensors_and_references_give_the_same_bytes(path, tmp_path):
    expected = tensors()
    save_safetensors(expected, {}, path)
    save_safetensors({name: reference(tensor) for name, tensor in expected.items()}, {}, tmp_path / "y.safetensors")
    save_safetensors(TensorDict(expected), {}, tmp_path / "z.safetensors")

    assert path.read_bytes() == (tmp_path / "y.safetensors").read_bytes()
    assert path.read_bytes() == (tmp_path / "z.safetensors").read_bytes()


@pytest.mark.parametrize(("shape", "fits"), [([4, 6], True), ([8, 3], False), ([], False)])
def test_packed_numbers_are_read_as_the_library_does(path, shape, fits):
    size = 12 if shape else 0
    content = f'{{"x":{{"dtype":"F4","shape":{shape},"data_offsets":[0,{size}]}}}}'.encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(range(size)))
    if not fits:
        with pytest.raises(CorruptError):
            check_safetensors(path)
        with pytest.raises(Exception, match=r".+"):
            safetensors.torch.load_file(path)
        return
    (found,) = load_safetensors(path, check_safetensors(path), Sources()).values()
    with safetensors.safe_open(path, framework="torch") as file:
        theirs = file.get_tensor("x")
    assert (found.read_only_tensor().dtype, found.shape) == (theirs.dtype, tuple(theirs.shape))
    assert torch.equal(found.read_only_tensor().view(torch.uint8), theirs.view(torch.uint8))


def test_reading_does_not_import_torch():
    code = (
        "import sys, vraxion_ckpt.formats.safetensors_writer; print({'torch', 'numpy', 'safetensors'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
