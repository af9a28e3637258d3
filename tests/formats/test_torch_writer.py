"""Torch files are what ``torch.save`` writes, and torch reads the same bits from them."""

from __future__ import annotations

import io
import pickletools
import weakref
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vraxion_ckpt.checkpoint.references import ITEMSIZES, ComputedBytes, TensorRef, reference
from vraxion_ckpt.checkpoint.source_files import Fingerprint, Sources, StoredBytes
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.errors import StorageError, UnsupportedError, UsageError
from vraxion_ckpt.formats import torch_writer, zip_layout
from vraxion_ckpt.formats.torch_reader import load_torch_references
from vraxion_ckpt.formats.torch_writer import save_torch_file, torch_file_size
from vraxion_ckpt.formats.zip_directory import ZipDirectory, opened_bytes
from vraxion_ckpt.support.file_copy import BLOCK

DTYPES = sorted(name for name in ITEMSIZES if not name.startswith(("q", "float4")))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.pt"


def random_bits(dtype: str, count: int = 24) -> torch.Tensor:
    """Return a tensor of random bits, so with NaNs of all kinds."""
    size = 1 if dtype == "bool" else 256
    return torch.randint(size, (count * ITEMSIZES[dtype],), dtype=torch.uint8).view(getattr(torch, dtype))


def ordered() -> OrderedDict[str, torch.Tensor]:
    entries = OrderedDict(weight=torch.rand(3, 4), bias=torch.rand(3))
    entries._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return entries


def tied() -> dict[str, Any]:
    base = torch.arange(40.0)
    same = base[3:7]
    return {"base": base, "slice": base[8:], "turned": base.view(5, 8).t(), "same": same, "again": same}


def shared_containers() -> dict[str, Any]:
    one = {"tensor": torch.ones(3)}
    losses = [1.5, 2.5]
    return {"one": one, "other": one, "losses": losses, "more": (losses, losses)}


def views() -> dict[str, torch.Tensor]:
    conj, neg = (torch.view_as_complex(torch.rand(4, 2)).conj() for _ in range(2))
    return {"conj": conj, "neg": neg.imag}


VALUES: dict[str, Any] = {
    "dtypes": {dtype: random_bits(dtype) for dtype in DTYPES},
    "packed": torch.zeros(2, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "shapes": [torch.tensor(3.5), torch.empty(0), torch.empty(2, 0, 3), torch.ones(1, 1, 1), torch.rand(3, 4).t()],
    "tied": tied(),
    "containers": shared_containers(),
    "ordered": ordered(),
    "views": views(),
    "parameters": [nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(2), False), torch.rand(2, requires_grad=True)],
    "scalars": {"a": 1, 2: [None, True, 2**70, -1, 1e300, float("nan"), "é\ud800", "cpu", "0", "storage"], "": ()},
    "numbers": list(map(float, range(10_000))),
    "tensor": torch.rand(4),
    "large": torch.randint(256, (5_000_001,), dtype=torch.uint8),
    "many": [torch.tensor(number) for number in range(1000)],
}


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def without_identity(content: bytes) -> bytes:
    """Blank the serialization id, and its checksums in the descriptor and the directory."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    identity = archive.read("archive/.data/serialization_id")
    crc = archive.getinfo("archive/.data/serialization_id").CRC.to_bytes(4, "little")
    assert content.count(identity) == 1
    assert content.count(crc) == 2
    return content.replace(identity, b"0" * 40).replace(crc, b"0000")


def same(one: Any, other: Any) -> bool:
    """Compare values by what torch writes of them, after each tensor was copied by torch itself."""
    return without_identity(saved(one)) == without_identity(saved(other))


@pytest.mark.parametrize("name", VALUES)
def test_has_the_bytes_that_torch_writes(path, name):
    save_torch_file(VALUES[name], path)

    assert without_identity(path.read_bytes()) == without_identity(saved(VALUES[name]))
    assert torch_file_size(VALUES[name]) == path.stat().st_size
    assert zipfile.ZipFile(path).testzip() is None


@pytest.mark.parametrize(("shares", "is_padded"), [(True, True), (False, False)])
def test_pads_large_storages_so_that_they_share_blocks_where_the_file_system_can(
    path, tmp_path, monkeypatch, shares, is_padded
):
    value = {"small": torch.rand(10), "large": torch.rand(2**18 + 5), "larger": torch.rand(2**19)}
    torch.save(value, tmp_path / "source.pt")
    payload = load_torch_references(tmp_path / "source.pt", Sources(), frozenset())
    del payload["small"]
    monkeypatch.setattr(torch_writer, "can_share_blocks", lambda *_: shares)
    save_torch_file(payload, path)

    found = torch.load(path)
    assert all(torch.equal(found[name], value[name]) for name in ("large", "larger"))
    assert zipfile.ZipFile(path).testzip() is None
    starts = [
        [file.read_bytes().index(value[name].numpy().tobytes()) for name in found]
        for file in (path, tmp_path / "source.pt")
    ]
    assert all((at - other) % BLOCK == 0 for at, other in zip(*starts, strict=True)) == is_padded


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", sorted(VALUES.keys() - {"packed"}))
def test_torch_reads_the_same_bits(path, name, mmap):
    save_torch_file(VALUES[name], path)

    assert same(torch.load(path, weights_only=True, mmap=mmap), torch.load(io.BytesIO(saved(VALUES[name]))))


def as_stored(value: Any, file: Path) -> Any:
    """Return a value with references to the storages in the file that torch has written."""
    source = Sources().add(file, Fingerprint.of(file))
    with opened_bytes(file) as data:
        members = {member.name: member for member in ZipDirectory(file, data).members()}
    stored: dict[Any, StoredBytes] = {}

    def change(each: Any) -> Any:
        if isinstance(each, torch.Tensor):
            ref = reference(each)
            if ref.storage not in stored:
                member = members[f"archive/data/{len(stored)}"]
                stored[ref.storage] = StoredBytes(source, member.start, member.size, member.crc, member.name)
            return TensorRef(
                stored[ref.storage],
                ref.dtype,
                ref.shape,
                ref.strides,
                ref.first,
                ref.requires_grad,
                ref.parameter,
                ref.conj,
                ref.neg,
            )
        if isinstance(each, OrderedDict):
            new = OrderedDict((key, change(entry)) for key, entry in each.items())
            new.__dict__.update(vars(each))
            return new
        if isinstance(each, dict):
            return {key: change(entry) for key, entry in each.items()}
        return [change(entry) for entry in each] if isinstance(each, list) else each

    return change(value), list(stored.values())


@pytest.mark.parametrize("name", sorted(VALUES.keys() - {"containers", "tied"}))
def test_references_give_the_same_bytes(path, name, tmp_path):
    (tmp_path / "source.pt").write_bytes(saved(VALUES[name]))
    value, storages = as_stored(VALUES[name], tmp_path / "source.pt")

    save_torch_file(value, path)

    assert without_identity(path.read_bytes()) == without_identity(saved(VALUES[name]))
    assert all(storage.proven for storage in storages)


def test_tied_references_stay_tied(path):
    base = reference(torch.arange(6.0))
    part = TensorRef(base.storage, "float32", (2,), (1,), 3)
    save_torch_file([base, part], path)

    whole, end = torch.load(path, weights_only=True)
    end += 1
    assert whole.tolist() == [0, 1, 2, 4, 5, 5]


def test_tensor_dicts_are_written_as_dicts(path):
    tensors = {"a": torch.ones(2), "b": [torch.zeros(3)]}
    save_torch_file({"model": TensorDict(tensors), "same": None}, path)

    assert without_identity(path.read_bytes()) == without_identity(saved({"model": tensors, "same": None}))


def test_it_does_not_matter_whether_somebody_has_looked(path, tmp_path):
    refs = TensorDict({"a": reference(torch.ones(2)), "b": reference(torch.ones(3))})
    value = {"one": refs, "other": refs.references()}
    save_torch_file(value, path)
    assert refs["a"].sum() == 2
    save_torch_file(value, tmp_path / "y.pt")

    assert path.read_bytes() == (tmp_path / "y.pt").read_bytes()


def test_computed_storages_are_freed_one_after_the_other(path):
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def compute(number: int) -> torch.Tensor:
        alive.append(sum(each() is not None for each in made))
        memory = np.full(1234, number, dtype=np.float32)
        made.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    storages = [ComputedBytes(4936, partial(compute, number)) for number in range(5)]
    save_torch_file([TensorRef.contiguous(storage, "float32", (1234,)) for storage in storages], path)

    assert alive == [0] * 5
    assert [each[0].item() for each in torch.load(path, weights_only=True)] == list(range(5))


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_zip64_fields_are_read_by_others(path, monkeypatch, limit):
    """With a lower limit, sizes and offsets are written as if they needed more than 32 bits."""
    monkeypatch.setattr(zip_layout, "_NEEDS_64", limit)
    save_torch_file(VALUES["dtypes"], path)

    archive = zipfile.ZipFile(path)
    assert archive.testzip() is None
    assert same(torch.load(path, weights_only=True), torch.load(io.BytesIO(saved(VALUES["dtypes"]))))


def test_more_members_than_16_bits_can_count(path):
    value = [torch.tensor(0, dtype=torch.uint8) for _ in range(65_600)]
    save_torch_file(value, path)

    assert len(zipfile.ZipFile(path).infolist()) == 65_600 + 6
    assert len(torch._C.PyTorchFileReader(str(path)).get_all_records()) == 65_600 + 6


def test_the_pickle_has_no_other_globals_than_those_of_torch(path):
    save_torch_file(VALUES, path)
    operations = pickletools.genops(zipfile.ZipFile(path).read("archive/data.pkl"))
    names = {argument for opcode, argument, _ in operations if opcode.name == "GLOBAL"}

    assert {name for name in names if not name.startswith("torch")} == {"collections OrderedDict"}


def test_other_values_are_refused(path):
    with pytest.raises(UnsupportedError, match="only plain data"):
        save_torch_file({"a": object()}, path)
    assert not path.exists()


def test_two_dtypes_in_one_memory_are_refused(path):
    numbers = torch.zeros(4)
    with pytest.raises(UnsupportedError, match="different dtypes"):
        save_torch_file([numbers, numbers.view(torch.int32)], path)
    with pytest.raises(RuntimeError, match="different types"):
        saved([numbers, numbers.view(torch.int32)])


def test_the_name_and_existing_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="as safetensors"):
        save_torch_file(1, tmp_path / "x.safetensors")
    (tmp_path / "x.pt").write_bytes(b"mine")
    with pytest.raises(StorageError, match="File exists"):
        save_torch_file(1, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").read_bytes() == b"mine"
