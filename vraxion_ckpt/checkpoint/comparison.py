"""Compare values, tensors and checkpoints bit by bit.

Two NaNs are equal if and only if their bits are equal.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
import zlib
from array import array
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

_memcmp = ctypes.CDLL(None).memcmp  # releases the GIL and allocates no memory
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_PIECE = 2**20  # fits into the CPU cache, so that the second read of a piece is cheap
_RUN = 2**14  # entries of a list that are compared at a time
_SCALARS = frozenset({str, int, float, bool, type(None)})
_THREADS = min(4, os.cpu_count() or 1)

_R = TypeVar("_R")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same type, dtype, shape and bits. Strides may differ."""
    if a is b:
        return True
    if not _alike(a, b):
        return False
    x, y = bytes_of(a), bytes_of(b)
    return x.data_ptr() == y.data_ptr() or _memcmp(x.data_ptr(), y.data_ptr(), len(x)) == 0


def checksum_if_same(a: Tensor, b: Tensor) -> int | None:
    """Return the CRC-32 of `b` if `a` has the same bits, else None. Reads each tensor once."""
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
    """Yield one line, with a key, for each difference between two plain values. The order of dict entries counts."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if not same(a, b):
            yield f"{key}: {_brief(a)} ≠ {_brief(b)}"
    elif type(a) is not type(b):
        yield f"{key}: {_brief(a)} ≠ {_brief(b)}"
    elif is_dataclass(a) and not isinstance(a, type):  # a dataclass's own == does not distinguish 0 from 0.0
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
            for i, x, y in unlike_entries(a, b):
                yield from differences(x, y, f"{key}[{i}]", same=same)
    elif isinstance(a, float):
        if struct.pack("<d", a) != struct.pack("<d", b):
            yield f"{key}: {a!r} ≠ {b!r}"
    elif a != b:
        yield f"{key}: {_brief(a)} ≠ {_brief(b)}"


def unlike_entries(a: Sequence[Any], b: Sequence[Any]) -> Iterator[tuple[int, Any, Any]]:
    """Yield index and both entries of two lists of the same length, except runs of identical numbers and strings."""
    for first in range(0, len(a), _RUN):
        one, other = a[first : first + _RUN], b[first : first + _RUN]
        if not _same_scalars(one, other):
            yield from zip(range(first, len(a)), one, other, strict=False)


def _same_scalars(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Return whether two lists hold only scalars, and hold the same. Floats are compared by their bits."""
    kinds = set(map(type, a))
    if not kinds <= _SCALARS or list(map(type, a)) != list(map(type, b)):
        return False
    if float not in kinds:
        return list(a) == list(b)
    if len(kinds) > 1 and any(x != y for x, y in zip(a, b, strict=True) if type(x) is not float):
        return False
    one, other = ([value for value in side if type(value) is float] if len(kinds) > 1 else side for side in (a, b))
    return array("d", one).tobytes() == array("d", other).tobytes()


def checkpoint_differences(a: Checkpoint, b: Checkpoint, *, same: Same = same_bits) -> Iterator[str]:
    """Yield one line for each difference in the contents of two checkpoints. Opens every expert.

    `origin` and `sources` are not compared.
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


# A function of a tensor. It returns the tensor that holds the expected bytes, and their CRC-32 or None.
Original = Callable[[Tensor], tuple[Tensor, int | None]]


def _itself(tensor: Tensor) -> tuple[Tensor, None]:
    return tensor, None


def differences_and_checksums(a: Checkpoint, b: Checkpoint, original: Original = _itself) -> Iterator[str]:
    """Yield the differences of two checkpoints, and record the CRC-32 of every source part that is read.

    The tensors are compared in a thread pool that reads every byte once. A tensor of `a` that is mapped from a file
    serves as its own original if the file's checksum confirms it. Otherwise, `b` is compared with the original.

    Args:
        a: the checkpoint that was written.
        b: the checkpoint that was read back.
        original: returns the tensor that holds the expected bytes of a tensor of `a`, and their CRC-32 or None.
    """
    postponed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def same_as_original(x: Tensor, y: Tensor) -> bool:
        holder, known = original(x)
        crc = checksum_if_same(holder, y)
        return crc is not None and known in (None, crc)

    def postpone(x: Tensor, y: Tensor) -> bool:
        if not x.is_contiguous() or not y.is_contiguous():
            return same_as_original(x, y)  # comparing copies non-contiguous tensors, so one at a time
        postponed[id(x), id(y)] = x, y
        return True

    def compare(pair: tuple[Tensor, Tensor]) -> bool | None:
        """Return whether two tensors are the same. None: they are, but both may differ from the original."""
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

    others = list(checkpoint_differences(a, b, same=postpone))
    parts = a.sources.parts() | b.sources.parts()
    originals = {id(x): original(x) for x, _ in postponed.values() if extent(x) not in parts}
    same = True
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        progress.progress_bar("comparing", size_of([x for x, _ in postponed.values()])) as count,
    ):
        for (x, y), alike in zip(postponed.values(), pool.map(compare, postponed.values()), strict=True):
            same = same and (same_as_original(x, y) if alike is None else alike)
            count(x.numel() * x.itemsize)
    if others or not same:  # repeat in order, to yield the differences in order
        yield from checkpoint_differences(a, b, same=same_as_original)


def different(pairs: Sequence[tuple[str, Tensor, Tensor]]) -> list[str]:
    """Return the names of those pairs whose tensors are not bit-identical."""
    same = in_threads(same_bits, [(x, y) for _, x, y in pairs])
    return [name for (name, _, _), alike in zip(pairs, same, strict=True) if not alike]


def in_threads(function: Callable[..., _R], items: Sequence[tuple[Tensor, ...]]) -> list[_R]:
    """Return the results of a function for several tuples of tensors.

    Tuples of contiguous tensors are processed in a thread pool. Tuples with a non-contiguous tensor are processed one
    at a time, because the function copies such tensors.
    """
    contiguous = [all(tensor.is_contiguous() for tensor in item) for item in items]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda item: function(*item), itertools.compress(items, contiguous))
        return [next(found) if threaded else function(*item) for item, threaded in zip(items, contiguous, strict=True)]


def without_experts(checkpoint: Checkpoint, ids: Collection[int]) -> Checkpoint:
    """Return a checkpoint without the tensors of some experts, so that they are neither compared nor opened."""
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
