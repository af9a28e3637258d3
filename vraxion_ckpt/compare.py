"""Where two values, tensors or checkpoints differ, bit by bit.

NaNs are compared by their bits, so a NaN equals itself and two different NaNs differ.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vraxion_ckpt.binding import unbind
from vraxion_ckpt.model import Checkpoint


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same type, dtype, shape and bits, whatever their strides."""
    if a is b:
        return True
    if type(a) is not type(b) or a.requires_grad != b.requires_grad:
        return False
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    # Only a tensor that is not contiguous is copied here, one at a time.
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def differences(a: Any, b: Any, key: str = "") -> Iterator[str]:
    """Yield one line for each place where two plain values differ; the order of dicts counts."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if not same_bits(a, b):
            yield f"{key}: {_brief(a)} ≠ {_brief(b)}"
    elif type(a) is not type(b):
        yield f"{key}: {_brief(a)} ≠ {_brief(b)}"
    elif isinstance(a, Mapping):
        if list(a) != list(b):
            yield f"{key}: entries or their order differ ({_first_difference(list(a), list(b))})"
        else:
            for name in a:
                yield from differences(a[name], b[name], f"{key}.{name}" if key else str(name))
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{key}: {len(a)} ≠ {len(b)} entries"
        else:
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                yield from differences(x, y, f"{key}[{i}]")
    elif isinstance(a, float):
        if struct.pack("<d", a) != struct.pack("<d", b):
            yield f"{key}: {a!r} ≠ {b!r}"
    elif a != b:
        yield f"{key}: {_brief(a)} ≠ {_brief(b)}"


def checkpoint_differences(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """Yield one line for each place where two checkpoints differ in what they hold.

    Where they came from (`origin.path`, `sources`) is not part of that. Opens every expert.
    """
    yield from differences(a.state_dict(), b.state_dict(), "model")
    yield from differences(a.metadata, b.metadata, "model._metadata")
    for name in ("kind", "position", "deleted"):
        yield from differences(
            getattr(a.head, name) if a.head else None, getattr(b.head, name) if b.head else None, f"head.{name}"
        )
    yield from differences(
        unbind(a.optimizer) if a.optimizer else None, unbind(b.optimizer) if b.optimizer else None, "optimizer"
    )
    if a.optimizer and b.optimizer:
        yield from differences(a.optimizer.params, b.optimizer.params, "optimizer names")
    for name in ("payload", "lifecycle", "plan", "history"):
        yield from differences(getattr(a, name), getattr(b, name), name)


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _first_difference(a: list[Any], b: list[Any]) -> str:
    pairs = ((x, y) for x, y in zip([*a, None], [*b, None], strict=False) if x != y)
    x, y = next(pairs, (None, None))
    return f"{x!r} ≠ {y!r}"
