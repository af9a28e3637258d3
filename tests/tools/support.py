"""Paths of the test data, and a comparison that does not use the package."""

from __future__ import annotations

import os
import subprocess
import termios
from collections import Counter
from pathlib import Path
from typing import Any

import forked
import numpy as np
import torch

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
EXPECTED = DATA / "expected"
MONOLITHS = sorted(DATA.glob("*.pt"))
DIRECTORIES = [*sorted(DATA.glob("modular_*")), EXPECTED / "named_experts3.modular"]


def load(path: Path) -> Any:
    """Load a file of torch.save with torch itself."""
    return torch.load(path, weights_only=True)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Compare two plain values: types, order, numbers exactly, tensors bit by bit, `_metadata` of state dicts."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), where
        assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad), where
        assert bits(a) == bits(b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict), where
        assert isinstance(a, Counter) == isinstance(b, Counter), where
        assert list(a) == list(b) or [*map(repr, a)] == [*map(repr, b)], where
        assert [*map(type, a)] == [*map(type, b)], where
        assert_same(getattr(a, "_metadata", None), getattr(b, "_metadata", None), f"{where}._metadata")
        for key, x, y in zip(a, a.values(), b.values(), strict=True):
            assert_same(x, y, f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert type(a) is type(b), where
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, set):
        assert type(a) is type(b), where
        assert sorted(map(repr, a)) == sorted(map(repr, b)), where
    elif isinstance(a, np.ndarray | np.generic):
        assert type(a) is type(b), where
        assert (a.dtype, a.shape, np.isfortran(a), a.tobytes()) == (b.dtype, b.shape, np.isfortran(b), b.tobytes()), (
            where
        )
    else:
        assert type(a) is type(b), where
        assert repr(a) == repr(b), where


def bits(tensor: torch.Tensor) -> bytes:
    """Return a tensor's elements as bytes."""
    flat = tensor.detach().resolve_conj().resolve_neg().flatten().clone(memory_format=torch.contiguous_format)
    return bytes(flat.as_strided((len(flat),), (1,)).view(torch.uint8).tolist())


def files_below(folder: Path) -> list[Path]:
    """List every file below a folder, relative to it."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def on_a_terminal(*arguments: object, python: str = "", columns: int = 80, **environment: str) -> str:
    """Run Python in a pseudo-terminal with the given width. Return its output. Without `python`, use a fork."""
    command = [python or forked.python(), *map(str, arguments)]
    surroundings = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    surroundings |= {"COLUMNS": str(columns), "TERM": "xterm-256color", **environment}
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, columns))
    chunks = []
    with subprocess.Popen(command, stdin=writer, stdout=writer, stderr=writer, env=surroundings):
        os.close(writer)
        while True:
            try:
                chunk = os.read(reader, 2**16)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
    os.close(reader)
    return b"".join(chunks).decode().replace("\r\n", "\n")
