"""Count the ring addresses that a VRAXION model visits, by running the model on random input.

Without VRAXION's runtime, the probe returns None. The model is built on the CPU from the shapes in the checkpoint, with
the checkpoint's weights except those of the head. The runtime reads its other settings from environment variables.
These are recorded with the result. Torch's random state and the runtime's global expert count are restored afterwards.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from vraxion_ckpt.plugin_api import (
    Checkpoint,
    CkptWarning,
    PluginError,
    Visits,
    count,
    hookimpl,
    listed,
)

RUNTIME = "vraxion.instnct.absolute_hallway"
_SETTINGS = "VRX_"  # prefix of the runtime's environment variables
_SEED, _SAMPLES, _BATCH, _SEQUENCE = 1337, 4096, 64, 16


@hookimpl
def probe_visits(checkpoint: Checkpoint) -> Visits | None:
    """Run the model on random input and count the addresses at which its pointer ends.

    Returns:
        The visits, or None if this is not a VRAXION model with a head or the runtime is not installed.

    Raises:
        PluginError: the runtime cannot be imported, or does not build the checkpoint's model.
    """
    import torch

    router, projection = checkpoint.router_map, checkpoint.core.get("input_proj.weight")
    if router is None or projection is None or projection.ndim != 2 or checkpoint.head is None:
        return None
    with torch.random.fork_rng(devices=[]):
        runtime = _import_runtime()
        if runtime is None:
            return None
        with _expert_heads(runtime, checkpoint.num_experts), torch.no_grad():
            model = _build(runtime, checkpoint, len(router), *projection.shape)
            visits = _count(model, len(router), projection.shape[1])
    return Visits(visits, note=f"visits counted by VRAXION's runtime on random input, {_settings()}")


def _import_runtime() -> Any | None:
    """Return the runtime's module, or None if it is not installed.

    Raises:
        PluginError: the runtime is installed, but importing it fails.
    """
    try:
        return import_module(RUNTIME)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{RUNTIME}.".startswith(f"{missing}."):
            return None
        raise PluginError(
            f"VRAXION's runtime is installed, but cannot be imported: {type(error).__name__}: {error}",
            key="vraxion_probe",
            hint="repair it, take it off PYTHONPATH, or give the visits as a file",
        ) from error


@contextmanager
def _expert_heads(runtime: Any, number: int) -> Iterator[None]:
    """Set the runtime's global expert count within the block."""
    before = getattr(runtime, "EXPERT_HEADS", None)
    runtime.EXPERT_HEADS = number
    try:
        yield
    finally:
        runtime.EXPERT_HEADS = before


def _build(runtime: Any, checkpoint: Checkpoint, ring_len: int, slot_dim: int, input_dim: int) -> Any:
    """Build the model and load the checkpoint's weights, except the head's. Warn of names that do not match."""
    import torch

    torch.manual_seed(_SEED)  # weights that the checkpoint lacks keep their initial values
    model = runtime.AbsoluteHallway(
        input_dim=input_dim, num_classes=_output_rows(checkpoint), ring_len=ring_len, slot_dim=slot_dim
    )
    body = {name: t.detach().clone() for name, t in checkpoint.core.items() if not name.startswith("head.")}
    try:
        unmatched = model.load_state_dict(body, strict=False)
    except RuntimeError as error:  # shapes differ
        raise PluginError(
            f"VRAXION's runtime builds another model than the checkpoint's: {error}",
            key="vraxion_probe",
            hint=f"set the environment variables of the training run; currently {_settings()}",
        ) from error
    _warn(unmatched.unexpected_keys, "of the checkpoint not used by VRAXION's runtime")
    lacking = [name for name in unmatched.missing_keys if not name.startswith("head.")]
    _warn(lacking, "of VRAXION's runtime not in the checkpoint, and therefore random")
    model.eval()
    return model


def _warn(names: Sequence[str], what: str) -> None:
    if names:
        message = (
            f"{count(len(names), 'weight')} {what} ({listed(names)}); "
            f"the counted visits may differ from those of the trained model. "
            f"Set the environment variables of the training run; currently {_settings()}"
        )
        warnings.warn(message, CkptWarning, stacklevel=2)


def _settings() -> str:
    """Describe the environment variables that configure the runtime."""
    found = [f"{name}={value[:80]}" for name, value in sorted(os.environ.items()) if name.startswith(_SETTINGS)]
    return f"with {', '.join(found)}" if found else f"no {_SETTINGS}* environment variable is set"


def _count(model: Any, ring_len: int, input_dim: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Feed random input. Return how often the pointer ends at each address, shape ``[ring_len]``."""
    import torch

    visits = np.zeros(ring_len, dtype=np.int64)
    torch.manual_seed(_SEED)
    for _ in range(math.ceil(_SAMPLES / _BATCH)):
        model(torch.randn(_BATCH, _SEQUENCE, input_dim))
        ended = model.last_ptr_int.reshape(-1).clamp(0, ring_len - 1).to(torch.int64)
        visits += np.bincount(ended.numpy(), minlength=ring_len)
    return visits


def _output_rows(checkpoint: Checkpoint) -> int:
    """Return the number of classes: the rows of the head's last weight."""
    assert checkpoint.head is not None
    expert = next(iter(checkpoint.head.experts.values()))
    weights = [tensor for leaf, tensor in expert.items() if leaf.endswith("weight")]
    if not weights:
        raise PluginError("the head has no weight, so the number of classes is unknown", key="vraxion_probe")
    return int(weights[-1].shape[0])
