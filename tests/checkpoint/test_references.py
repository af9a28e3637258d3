"""References describe tensors as torch does, and give back the same tensors."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import bits
from torch import Tensor, nn

from vraxion_ckpt.checkpoint.references import (
    ITEMSIZES,
    ComputedBytes,
    MadeBytes,
    TensorRef,
    as_reference,
    is_tensor,
    reference,
    was_written,
)
from vraxion_ckpt.checkpoint.source_files import Sources, StoredBytes
from vraxion_ckpt.checkpoint.tensor_bytes import byte_pieces
from vraxion_ckpt.formats.torch_reader import load_torch_references


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


TENSORS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: randn(3, 4),
    "scalar": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(3, 0, 2),
    "transposed": lambda: randn(3, 4).T,
    "every other column": lambda: randn(3, 8)[:, ::2],
    "slice": lambda: randn(10)[3:7],
    "expanded size of 1": lambda: randn(4, 1, 2),
    "strided single element": lambda: randn(9).as_strided((1,), (5,), 2),
    "integers": lambda: torch.arange(-3, 4),
    "bools": lambda: torch.tensor([True, False]),
    "bfloat16": lambda: randn(5).bfloat16(),
    "float8": lambda: randn(5).to(torch.float8_e4m3fn),
    "complex": lambda: randn(4, dtype=torch.complex64),
    "conjugate": lambda: randn(4, dtype=torch.complex64).conj(),
    "negative": lambda: randn(4, dtype=torch.complex64).conj().imag,
    "negated conjugate": lambda: torch._neg_view(randn(4, dtype=torch.complex64).conj()),
    "requires grad": lambda: randn(2, 2).requires_grad_(),
    "parameter": lambda: nn.Parameter(randn(2, 2)),
    "frozen parameter": lambda: nn.Parameter(randn(2, 2), requires_grad=False),
}


def from_file(tensor: Tensor, folder: Path) -> TensorRef:
    torch.save([tensor], folder / "a.pt")
    (found,) = load_torch_references(folder / "a.pt", Sources())
    return found


def computed(tensor: Tensor, _: Path) -> TensorRef:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    storage = ComputedBytes(plain.numel() * plain.itemsize, lambda: plain.clone())
    return TensorRef.contiguous(storage, str(plain.dtype).removeprefix("torch."), tuple(plain.shape))


WAYS: dict[str, Callable[[Tensor, Path], TensorRef]] = {
    "file": from_file,
    "memory": lambda tensor, _: reference(tensor),
}


def same(found: Tensor, expected: Tensor) -> None:
    assert type(found) is type(expected)
    for facts in (
        lambda t: (t.dtype, t.shape, t.stride(), t.storage_offset(), t.requires_grad, t.is_conj(), t.is_neg()),
        bits,
    ):
        assert facts(found) == facts(expected)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_a_reference_has_the_attributes_of_its_tensor(make, way, tmp_path):
    tensor = make()
    ref = way(tensor, tmp_path)
    assert is_tensor(ref)
    assert (f"torch.{ref.dtype}", ref.shape, ref.strides, ref.first) == (
        str(tensor.dtype),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.storage_offset(),
    )
    assert (ref.itemsize, ref.ndim, ref.numel()) == (tensor.itemsize, tensor.ndim, tensor.numel())
    assert ref.nbytes == tensor.numel() * tensor.itemsize
    assert ref.is_floating_point() == tensor.is_floating_point()
    assert ref.is_complex() == tensor.is_complex()
    assert ref.is_contiguous() == tensor.is_contiguous()
    assert (ref.requires_grad, ref.conj, ref.neg) == (tensor.requires_grad, tensor.is_conj(), tensor.is_neg())
    assert ref.parameter == isinstance(tensor, nn.Parameter)
    assert ref.storage.nbytes == tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_a_reference_gives_the_tensor(make, way, tmp_path):
    tensor = make()
    ref = way(tensor, tmp_path)
    same(ref.read_only_tensor(), tensor)
    same(ref.tensor(), tensor)
    assert ref.tensor() is ref.tensor()
    assert reference(ref.tensor()) is ref is as_reference(ref) is as_reference(ref.tensor())
    assert ref.read_only_tensor() is not ref.tensor()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_copies_share_no_memory(make, way, tmp_path):
    tensor = make()
    ref = way(tensor, tmp_path)
    copied, deep = ref.copied(), copy.deepcopy(ref)
    assert copied.requires_grad == (ref.requires_grad and ref.parameter)
    assert deep.requires_grad == ref.requires_grad
    for other in (copied, deep):
        found = other.tensor()
        assert bits(found) == bits(tensor)
        assert (type(found), found.dtype) == (type(tensor), tensor.dtype)
        with torch.no_grad():
            found.copy_(torch.zeros_like(found))
    assert bits(ref.tensor()) == bits(make())


@pytest.mark.parametrize("way", [*WAYS.values(), computed], ids=[*WAYS, "computed"])
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_pieces_are_the_bytes_of_the_elements(make, way, tmp_path):
    tensor = make()
    pieces = b"".join(map(bytes, byte_pieces(way(tensor, tmp_path))))
    assert pieces == bits(tensor)


def test_element_sizes_are_those_of_torch():
    dtypes = {getattr(torch, name) for name in vars(torch) if isinstance(getattr(torch, name), torch.dtype)}
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    assert set(ITEMSIZES) <= names
    for name, size in ITEMSIZES.items():
        assert getattr(torch, name).itemsize == size
    others = {name for name in names - set(ITEMSIZES) if not name.startswith(("bits", "int", "uint"))}
    assert not others, "torch has dtypes without a size here"


def test_views_have_one_storage():
    base = randn(4, 4)
    views = [reference(view) for view in (base, base[1:], base.T, base.view(torch.int32), nn.Parameter(base))]
    assert len({id(view.storage) for view in views}) == 1
    assert reference(base.clone()).storage is not views[0].storage


def test_a_view_that_a_plugin_makes_of_a_file_has_the_storage_of_the_file(tmp_path):
    ref = from_file(randn(4, 4), tmp_path)
    view = reference(ref.tensor()[1:])
    assert view.storage is ref.storage
    assert (view.shape, view.first) == ((3, 4), 4)


def test_memory_that_is_used_again_gets_a_storage_of_its_own():
    for value in range(20):
        tensor = torch.full((1000,), float(value))
        assert reference(tensor).read_only_tensor()[0] == value
        del tensor
        gc.collect()


def test_a_tensor_that_changes_its_shape_gets_another_reference():
    tensor = randn(6)
    before = reference(tensor)
    tensor.resize_(2, 3)
    after = reference(tensor)
    assert (before.shape, after.shape) == ((6,), (2, 3))
    assert before.storage is after.storage
    assert before.tensor().shape == (6,)
    tensor.requires_grad_()
    assert reference(tensor).requires_grad
    tensor.detach_()
    tensor.data = torch.zeros(2, 3)
    assert not reference(tensor).read_only_tensor().any()


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda tensor: tensor.mul_(2),
    "item": lambda tensor: tensor.__setitem__(0, 5.0),
    "through a view": lambda tensor: tensor[1:].zero_(),
    "data": lambda tensor: tensor.data.zero_(),
    "numpy": lambda tensor: tensor.numpy().fill(3),
    "storage": lambda tensor: tensor.untyped_storage().fill_(7),
}
COUNTED = {"in place", "item", "through a view"}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("way", [*WAYS.values(), computed], ids=[*WAYS, "computed"])
def test_a_write_is_found_and_does_not_reach_the_file(way, name, tmp_path):
    ref = way(randn(50), tmp_path)
    before = bits(ref.read_only_tensor())
    if isinstance(ref.storage, MadeBytes):
        ref.storage.note()
    tensor = ref.tensor()
    assert not was_written(ref)
    assert not ref.storage.was_written_into()
    WRITES[name](tensor)
    assert was_written(ref) == (name in COUNTED)
    assert ref.storage.was_written_into()
    assert bits(tensor) != before
    assert bits(ref.read_only_tensor()) == bits(tensor)  # the memory that somebody owns has the values
    if isinstance(ref.storage, StoredBytes):
        assert bits(torch.load(tmp_path / "a.pt", weights_only=True)[0]) == before


@pytest.mark.parametrize("way", [*WAYS.values(), computed], ids=[*WAYS, "computed"])
def test_a_write_that_is_undone_is_no_difference(way, tmp_path):
    ref = way(randn(50), tmp_path)
    if isinstance(ref.storage, MadeBytes):
        ref.storage.note()
    tensor = ref.tensor()
    old = tensor[3].clone()
    tensor[3] = 100.0
    tensor[3] = old
    assert was_written(ref)
    assert not ref.storage.was_written_into()


def test_bytes_that_nobody_got_are_not_read_for_the_test(tmp_path):
    ref = from_file(randn(50), tmp_path)
    (tmp_path / "a.pt").unlink()
    assert not ref.storage.was_written_into()


def test_computed_bytes_are_computed_when_they_are_needed_and_kept_for_plugins():
    calls = []

    def compute() -> Tensor:
        calls.append(1)
        return torch.arange(12)[::2]  # neither contiguous nor the whole storage

    ref = TensorRef.contiguous(ComputedBytes(48, compute), "int64", (6,))
    assert not calls
    assert ref.read_only_tensor().tolist() == [0, 2, 4, 6, 8, 10]
    assert ref.storage.read(8, 16) == torch.tensor([2, 4]).numpy().tobytes()
    assert len(calls) == 2
    tensor = ref.tensor()
    del tensor
    gc.collect()
    assert ref.tensor().tolist() == [0, 2, 4, 6, 8, 10]
    assert len(calls) == 3


def test_a_tensor_of_a_file_is_pickled_as_any_other(tmp_path):
    tensor = from_file(randn(3, 4).T, tmp_path).tensor()
    same(pickle.loads(pickle.dumps(tensor)), randn(3, 4).T)
    assert bits(copy.deepcopy(tensor)) == bits(randn(3, 4).T)
