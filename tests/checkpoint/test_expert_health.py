"""Experts with zeros of every dtype, against torch's own comparison with zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vraxion_ckpt.checkpoint.expert_health import is_zero
from vraxion_ckpt.checkpoint.references import ITEMSIZES, TensorRef
from vraxion_ckpt.checkpoint.source_files import Fingerprint, SourceFile, StoredBytes

INEXACT = [
    name
    for name in ITEMSIZES
    if hasattr(torch, name) and name.startswith(("float", "bfloat", "complex")) and name != "float4_e2m1fn_x2"
]


def patterns(dtype: str) -> list[bytes]:
    """Return elements of a dtype: every byte for small ones; each single bit, and zero, for others."""
    size = ITEMSIZES[dtype]
    if size == 1:
        return [bytes([value]) for value in range(256)]
    return [bytes(size), *((1 << bit).to_bytes(size, "little") for bit in range(8 * size))]


def holds_zero(element: bytes, dtype: str) -> bool:
    tensor = torch.from_numpy(np.frombuffer(element, np.uint8).copy()).view(getattr(torch, dtype))
    return not bool(tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).any())


@pytest.mark.parametrize("dtype", INEXACT)
def test_zeros_are_recognised_by_their_bits(dtype):
    for element in patterns(dtype):
        if len(element) > 1 and dtype.startswith("complex"):
            parts = getattr(torch, {"complex32": "float16", "complex64": "float32", "complex128": "float64"}[dtype])
            raw = torch.from_numpy(np.frombuffer(element, np.uint8).copy()).view(parts)
            expected = not bool(raw.any())
        else:
            expected = holds_zero(element, dtype)
        tensor = torch.from_numpy(np.frombuffer(element * 3, np.uint8).copy()).view(getattr(torch, dtype))
        assert is_zero({"weight": tensor}) == expected, element.hex()


@pytest.mark.parametrize("place", [0, 1023, 1024, 300_000, 599_999])
@pytest.mark.parametrize("strides", [(1,), (2,)])
def test_one_weight_is_found_wherever_it_is_in_a_file(place, strides, tmp_path):
    file = tmp_path / "weights"
    numbers = np.full(1_200_001, -0.0, np.float32)
    numbers[1 + place * strides[0]] = 1e-45
    file.write_bytes(numbers.tobytes())
    stored = StoredBytes(SourceFile(file, Fingerprint.of(file)), 0, numbers.nbytes, alignment=4)
    found = TensorRef(stored, "float32", (600_000,), strides, first=1)
    assert not is_zero({"weight": found})
    file.write_bytes(np.full(1_200_001, -0.0, np.float32).tobytes())
    stored = StoredBytes(SourceFile(file, Fingerprint.of(file)), 0, numbers.nbytes, alignment=4)
    assert is_zero({"weight": TensorRef(stored, "float32", (600_000,), strides, first=1)})
    assert not is_zero({"running_mean": TensorRef(stored, "float32", (600_000,), strides, first=1)})
