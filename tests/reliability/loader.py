"""The state with which a trainer resumes from a checkpoint, computed like VRAXION's loader does.

It reads ``router.state``, then the shard of each expert if the file exists, then ``meta.json``. It makes missing
folders, and silently skips everything that it cannot use. So a successful load proves nothing, and the tests compare
the values of the model. Written from the description of the layouts, without code of the package under test.
"""

from __future__ import annotations

import hashlib
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

# If a shard is missing or cannot be used, the expert keeps its random initial values.
RANDOM = "random"


def resume(path: Path) -> tuple[Any, ...] | None:
    """Return the state with which a trainer resumes, comparable by ``==``; None if it cannot start."""
    if not path.is_dir():
        return (_values(path.read_bytes()),) if path.is_file() else None
    (path / "system").mkdir(exist_ok=True)
    (path / "experts").mkdir(exist_ok=True)
    router = path / "system" / "router.state"
    if not router.is_file():
        return None
    experts = _number_of_experts(router.read_bytes())
    shards = tuple(_shard(path / "experts" / f"expert_{i:03d}.pt") for i in range(experts))
    return _values(router.read_bytes()), shards, _rows(path / "experts" / "meta.json", max(experts, 1))


def _shard(path: Path) -> str:
    if not path.exists():
        return RANDOM
    try:
        return _values(path.read_bytes())
    except Exception:  # the loader logs and ignores all errors
        return RANDOM


def _rows(path: Path, experts: int) -> tuple[Any, ...] | None:
    """Return the lifecycle rows of the experts of the model; rows are assigned by position."""
    try:
        rows = json.loads(path.read_text())["experts"]
    except (OSError, ValueError, KeyError):
        return None
    keys = ("contrib", "last_used_step", "created_step", "tenured")
    return tuple(tuple(row.get(key, 0) for key in keys) for row in rows[:experts])


@lru_cache(maxsize=4096)
def _number_of_experts(content: bytes) -> int:
    """Return how many experts have shards; a single head is in router.state."""
    payload = torch.load(io.BytesIO(content), weights_only=True)
    return 0 if any(name.startswith("head.single.") for name in payload["model"]) else int(payload["num_experts"])


@lru_cache(maxsize=4096)
def _values(content: bytes) -> str:
    """Return a digest of each value in a torch file; for tensors, of dtype, shape and bits."""
    digest = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digest.update(repr((str(value.dtype), tuple(value.shape))).encode() + data)
        elif isinstance(value, dict):
            for key, entry in value.items():
                digest.update(repr(key).encode())
                take(entry)
        elif isinstance(value, list | tuple):
            digest.update(repr((type(value), len(value))).encode())
            for entry in value:
                take(entry)
        else:
            digest.update(repr(value).encode())

    take(torch.load(io.BytesIO(content), weights_only=True))
    return digest.hexdigest()
