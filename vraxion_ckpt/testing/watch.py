"""Detect changes of a checkpoint in memory and of files on disk."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vraxion_ckpt.checkpoint.comparison import checkpoint_differences, differences
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.plugins.lent_tensors import LentTensors, counted_writes


@contextmanager
def untouched(checkpoint: Checkpoint) -> Iterator[None]:
    """Fail if the block changes a checkpoint's containers, its tensors, or global random state.

    Tensors are compared with a copy bit by bit, or with their file, which detects writes through ``.data`` or
    ``.numpy()``. Torch's version counters are compared, too: they detect writes that do not change a value.
    """
    before, lent, state = copy.deepcopy(checkpoint), LentTensors(checkpoint), _random_state()
    counted = counted_writes(checkpoint)
    yield
    changed = list(checkpoint_differences(before, checkpoint))
    changed += differences(before.param_names, checkpoint.param_names, "param_names")
    assert not changed, "the input was changed: " + "; ".join(changed)
    written = [name for name in (*counted_writes(checkpoint), *lent.altered()) if name not in counted]
    assert not written, f"tensors were written to: {', '.join(written)}"
    moved = list(differences(state, _random_state(), "global random state"))
    assert not moved, "; ".join(moved)


def _random_state() -> dict[str, Any]:
    _, keys, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "numpy": [torch.tensor(keys), *rest], "random": random.getstate()}


def written(adapter: Adapter, checkpoint: Checkpoint, path: Path) -> Path:
    """Write the part of a checkpoint that the format can hold to a new path. Return the path."""
    if adapter_calls.is_directory(adapter):
        path.mkdir()
    adapter_calls.write(adapter, adapter_calls.held(adapter, checkpoint), path)
    return path


def contents(path: Path) -> dict[Path, bytes]:
    """Return the content of each file of a checkpoint by its relative path."""
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    return {file.relative_to(path): file.read_bytes() for file in files}


def changed_files(before: Mapping[Path, bytes], after: Mapping[Path, bytes]) -> list[str]:
    """Describe the files that are missing, new or different between two results of `contents`."""
    listed = [f"{name} is missing" for name in before.keys() - after.keys()]
    listed += [f"{name} is new" for name in after.keys() - before.keys()]
    listed += [f"{name} differs" for name in before.keys() & after.keys() if before[name] != after[name]]
    return sorted(listed)
