"""Where two values, tensors or checkpoints differ, bit by bit.

NaNs are compared by their bits, so a NaN equals itself and two different NaNs differ.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.plain_data import bytes_of, dtype_and_shape, in_pieces, size_of
from vraxion_ckpt.checkpoint.shared_memory import extent
from vraxion_ckpt.checkpoint.torch_optimizer import unbind
from vraxion_ckpt.support import progress
from vraxion_ckpt.wording import shortened

_memcmp = ctypes.CDLL(None).memcmp  # lets other threads run, and needs no memory
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_PIECE = 2**20  # is still in the processor's cache when it is looked at again
_THREADS = min(4, os.cpu_count() or 1)

_R = TypeVar("_R")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same type, dtype, shape and bits, whatever their strides."""
    if a is b:
        return True
    if not _alike(a, b):
        return False
    x, y = bytes_of(a), bytes_of(b)
    return x.data_ptr() == y.data_ptr() or _memcmp(x.data_ptr(), y.data_ptr(), len(x)) == 0


def checksum_if_same(a: Tensor, b: Tensor) -> int | None:
    """Return the CRC-32 of `b` if `a` has the same bits, else None; reads each of them from memory once."""
    if not _alike(a, b):
        return None
    crc = 0
    for x, y in in_pieces(bytes_of(a), bytes_of(b), size=_PIECE):
        if _memcmp(x.data_ptr(), y.data_ptr(), len(x)):
            return None
        crc = zlib.crc32(y.numpy().data, crc)
    return crc


def _alike(a: Tensor, b: Tensor) -> bool:
    same_kind = type(a) is type(b) and a.requires_grad == b.requires_grad
    return same_kind and a.dtype == b.dtype and a.shape == b.shape


Same = Callable[[Tensor, Tensor], bool]


def differences(a: Any, b: Any, key: str = "", *, same: Same = same_bits) -> Iterator[str]:
    """Yield one line for each place where two plain values differ; the order of dicts counts."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if not same(a, b):
            yield f"{key}: {_brief(a)} ≠ {_brief(b)}"
    elif type(a) is not type(b):
        yield f"{key}: {_brief(a)} ≠ {_brief(b)}"
    elif is_dataclass(a) and not isinstance(a, type):  # whose own equality takes 0 for 0.0
        compared = [f.name for f in fields(a) if f.compare]
        one, other = ({name: getattr(value, name) for name in compared} for value in (a, b))
        yield from differences(one, other, key, same=same)
    elif isinstance(a, Mapping):
        if isinstance(a, OrderedDict) and (vars(a) or vars(b)):
            yield from differences(vars(a), vars(b), f"{key} attributes", same=same)
        if list(a) != list(b):
            yield f"{key}: entries or their order differ ({_first_difference(list(a), list(b))})"
        else:
            for name in a:
                yield from differences(a[name], b[name], f"{key}.{name}" if key else str(name), same=same)
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{key}: {len(a)} ≠ {len(b)} entries"
        else:
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                yield from differences(x, y, f"{key}[{i}]", same=same)
    elif isinstance(a, float):
        if struct.pack("<d", a) != struct.pack("<d", b):
            yield f"{key}: {a!r} ≠ {b!r}"
    elif a != b:
        yield f"{key}: {_brief(a)} ≠ {_brief(b)}"


def checkpoint_differences(a: Checkpoint, b: Checkpoint, *, same: Same = same_bits) -> Iterator[str]:
    """Yield one line for each place where two checkpoints differ in what they hold.

    Where they came from (`origin.path`, `sources`) is not part of that. Opens every expert.
    """
    yield from differences(a.state_dict(), b.state_dict(), "model", same=same)
    yield from differences(a.metadata, b.metadata, "model._metadata", same=same)
    for name in ("kind", "position", "deleted"):
        yield from differences(
            getattr(a.head, name) if a.head else None,
            getattr(b.head, name) if b.head else None,
            f"head.{name}",
            same=same,
        )
    yield from differences(
        unbind(a.optimizer) if a.optimizer else None,
        unbind(b.optimizer) if b.optimizer else None,
        "optimizer",
        same=same,
    )
    if a.optimizer and b.optimizer:
        yield from differences(a.optimizer.params, b.optimizer.params, "optimizer names", same=same)
    for name in ("payload", "lifecycle", "plan", "history"):
        yield from differences(getattr(a, name), getattr(b, name), name, same=same)


# Gives what holds the bytes that a tensor must have, and their checksum if that is known.
Original = Callable[[Tensor], tuple[Tensor, int | None]]


def _itself(tensor: Tensor) -> tuple[Tensor, None]:
    return tensor, None


def differences_and_checksums(a: Checkpoint, b: Checkpoint, original: Original = _itself) -> Iterator[str]:
    """Yield what `checkpoint_differences` does; on the way, note the checksums of both sides' sources.

    Tensors are set aside, and then looked at by several threads, which read every byte once. Those of `b` are compared
    with the originals of those of `a`; where a file states a checksum, and `b` has it, that is the proof.
    """
    aside: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def same_as_original(x: Tensor, y: Tensor) -> bool:
        holder, known = original(x)
        crc = checksum_if_same(holder, y)
        return crc is not None and known in (None, crc)

    def set_aside(x: Tensor, y: Tensor) -> bool:
        if not x.is_contiguous() or not y.is_contiguous():
            return same_as_original(x, y)  # here, for it is copied, and there must be but one copy at a time
        aside[id(x), id(y)] = x, y
        return True

    def look(pair: tuple[Tensor, Tensor]) -> bool | None:
        """Tell whether two tensors are the same; None if they are, but may both differ from the original."""
        x, y = pair
        holder, known = originals.get(id(x), (x, None))
        crc = checksum_if_same(holder, y)
        if crc is None or known not in (None, crc):
            return False
        if theirs := parts.get(extent(y)):
            theirs.note(crc)
        ours = parts.get(extent(x))
        stated = ours is not None and ours.note(crc)
        return True if stated or id(x) in originals else None

    others = list(checkpoint_differences(a, b, same=set_aside))
    parts = a.sources.parts() | b.sources.parts()
    originals = {id(x): original(x) for x, _ in aside.values() if extent(x) not in parts}
    same = True
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        progress.progress_bar("comparing", size_of([x for x, _ in aside.values()])) as count,
    ):
        for (x, y), alike in zip(aside.values(), pool.map(look, aside.values()), strict=True):
            same = same and (same_as_original(x, y) if alike is None else alike)
            count(x.numel() * x.itemsize)
    if others or not same:  # once more, in order
        yield from checkpoint_differences(a, b, same=same_as_original)


def different(pairs: Sequence[tuple[str, Tensor, Tensor]]) -> list[str]:
    """Return the names of the pairs of tensors that are not the same, bit for bit."""
    same = in_threads(same_bits, [(x, y) for _, x, y in pairs])
    return [name for (name, _, _), alike in zip(pairs, same, strict=True) if not alike]


def in_threads(function: Callable[..., _R], items: Sequence[tuple[Tensor, ...]]) -> list[_R]:
    """Return what a function gives for some tensors each time; called in several threads, unless it would copy them."""
    contiguous = [all(tensor.is_contiguous() for tensor in item) for item in items]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda item: function(*item), itertools.compress(items, contiguous))
        return [next(found) if threaded else function(*item) for item, threaded in zip(items, contiguous, strict=True)]


def without_experts(checkpoint: Checkpoint, ids: Collection[int]) -> Checkpoint:
    """Leave some experts' tensors out, so that they are neither compared nor opened."""
    if checkpoint.head is None or not ids:
        return checkpoint
    experts = {i: expert for i, expert in checkpoint.head.experts.items() if i not in ids}
    return replace(checkpoint, head=replace(checkpoint.head, experts=experts))


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return dtype_and_shape(value)
    return shortened(repr(value), 60)


def _first_difference(a: list[Any], b: list[Any]) -> str:
    pairs = ((x, y) for x, y in zip([*a, None], [*b, None], strict=False) if x != y)
    x, y = next(pairs, (None, None))
    return f"{x!r} ≠ {y!r}"
