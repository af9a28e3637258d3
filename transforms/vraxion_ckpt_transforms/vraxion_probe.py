"""Count the ring addresses that a VRAXION model visits, by running it; silent where its runtime is not installed.

The model is built on the CPU from the shapes in the checkpoint, with its own weights except the head's, and fed random
input. The random state and the runtime's global expert count are as before afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from vraxion_ckpt.errors import PluginError
from vraxion_ckpt.hookspecs import hookimpl
from vraxion_ckpt.model import Checkpoint
from vraxion_ckpt.ring import Visits

RUNTIME = "vraxion.instnct.absolute_hallway"
_SEED, _SAMPLES, _BATCH, _SEQUENCE = 1337, 4096, 64, 16


@hookimpl
def probe_visits(checkpoint: Checkpoint) -> Visits | None:
    """Run the model on random input and count where its pointer ends; None if this is not such a model."""
    if not _runtime_is_installed():
        return None
    router, projection = checkpoint.router_map, checkpoint.core.get("input_proj.weight")
    if router is None or projection is None or checkpoint.head is None:
        return None
    ring_len, (slot_dim, input_dim) = len(router), projection.shape
    classes = _output_rows(checkpoint)
    visits = np.zeros(ring_len, dtype=np.int64)
    with _runtime(checkpoint.num_experts) as runtime, torch.no_grad():
        model = runtime.AbsoluteHallway(input_dim=input_dim, num_classes=classes, ring_len=ring_len, slot_dim=slot_dim)
        body = {name: t.detach().clone() for name, t in checkpoint.core.items() if not name.startswith("head.")}
        model.load_state_dict(body, strict=False)
        model.eval()
        torch.manual_seed(_SEED)
        for _ in range(math.ceil(_SAMPLES / _BATCH)):
            model(torch.randn(_BATCH, _SEQUENCE, input_dim))
            ended = model.last_ptr_int.reshape(-1).clamp(0, ring_len - 1).to(torch.int64)
            visits += np.bincount(ended.numpy(), minlength=ring_len)
    return Visits(visits)


def _runtime_is_installed() -> bool:
    try:
        return find_spec(RUNTIME) is not None
    except (ImportError, ValueError):
        return False


def _output_rows(checkpoint: Checkpoint) -> int:
    """Return the number of classes: the rows of the head's last weight."""
    assert checkpoint.head is not None
    expert = next(iter(checkpoint.head.experts.values()))
    weights = [tensor for leaf, tensor in expert.items() if leaf.endswith("weight")]
    if not weights:
        raise PluginError("the head has no weight to tell the number of classes from", key="vraxion_probe")
    return int(weights[-1].shape[0])


@contextmanager
def _runtime(num_experts: int) -> Iterator[Any]:
    runtime = import_module(RUNTIME)
    before = getattr(runtime, "EXPERT_HEADS", None)
    with torch.random.fork_rng(devices=[]):
        runtime.EXPERT_HEADS = num_experts  # type: ignore[attr-defined]
        try:
            yield runtime
        finally:
            runtime.EXPERT_HEADS = before  # type: ignore[attr-defined]
