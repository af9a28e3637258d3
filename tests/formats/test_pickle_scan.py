"""The scan of a pickle has the same result if it follows the opcodes of a tensor at once as one by one."""

from __future__ import annotations

import io
import random
import zipfile
from typing import Any

import pytest
import torch

from vraxion_ckpt.errors import CkptError
from vraxion_ckpt.formats import pickle_scan
from vraxion_ckpt.formats.stand_ins import StandIns

OPCODES = b"((hjXKMJtQ)R\x85\x86\x87\x88\x89qrusae}].\x81b\x8a"


def pickle_of_tensors() -> bytes:
    base = torch.rand(3)
    several = {"views": (base, base[1:]), "scalar": torch.tensor(1.0), "many": torch.rand(2, 2, 2, 2, 2)}
    buffer = io.BytesIO()
    torch.save({"first": [torch.rand(2, 3) for _ in range(45)], **several, "p": torch.nn.Parameter(base)}, buffer)
    return zipfile.ZipFile(buffer).read("archive/data.pkl")


def scanned(data: bytes) -> tuple[Any, ...]:
    scan = pickle_scan.PickleScan(data, StandIns(len(data)).find)
    try:
        scan.run()
    except (CkptError, pickle_scan._TupleAsKeyError, pickle_scan.pickle.UnpicklingError) as error:
        return type(error), str(error)
    kinds = [[min(kind, pickle_scan._EMPTY_TUPLE) for kind in each] for each in (scan._stack, scan._memo)]
    return scan.unknown, scan.odd_keys, kinds, scan._marks, scan._gaps


def test_damaged_pickles_have_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, chosen = pickle_of_tensors(), random.Random(1)
    start = whole.index(b"r\x00\x01\0\0")  # from here on, the memo has 256 values
    for number in range(3000):
        data = bytearray(whole)
        at = chosen.randrange(start, len(data))
        if number % 3:
            data[at] = chosen.choice(OPCODES) if number % 3 == 1 else chosen.randrange(256)
        else:
            data[at : at + chosen.randrange(3)] = bytes([chosen.choice(OPCODES)])
        at_once = scanned(bytes(data))
        with monkeypatch.context() as patch:
            patch.setattr(pickle_scan, "_TENSOR", lambda *_: None)
            assert scanned(bytes(data)) == at_once


def test_tensors_are_followed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    match = pickle_scan._TENSOR
    monkeypatch.setattr(pickle_scan, "_TENSOR", lambda *arguments: found.append(match(*arguments)) or found[-1])
    scanned(pickle_of_tensors())

    assert sum(each is not None for each in found) > 10
