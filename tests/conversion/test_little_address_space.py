"""Where files cannot be mapped as a whole, as under ``ulimit -v``, their bytes are read piece by piece."""

from __future__ import annotations

import errno
import mmap
import os

import pytest
import torch
from support import DATA

import vraxion_ckpt as vc

SPLIT = ["mitosis_split:parent=0,addresses=[0]"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", "/"])
def test_a_file_that_cannot_be_mapped_is_read(tmp_path, monkeypatch, suffix):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def refuse_torch(*_: object) -> None:
        raise RuntimeError("unable to mmap 100 bytes from file: Cannot allocate memory (12)")

    source, usual, found = f"{tmp_path}/source{suffix}", f"{tmp_path}/usual{suffix}", f"{tmp_path}/found{suffix}"
    vc.convert(DATA / "wallclock_experts3.pt", source)
    vc.convert(source.rstrip("/"), usual, transforms=SPLIT)
    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse_torch)
    vc.convert(source.rstrip("/"), found, transforms=SPLIT)
    monkeypatch.undo()

    assert vc.diff(found.rstrip("/"), usual.rstrip("/")).identical
