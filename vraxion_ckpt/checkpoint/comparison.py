"""Compare values, tensors and checkpoints bit by bit.

Two NaNs are equal if and only if their bits are equal.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

from vraxion_ckpt.checkpoint.foreign_values import stand_in_of
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.plain_data import PLAIN_TYPES, bytes_of, dtype_and_shape, in_fixed_order
from vraxion_ckpt.checkpoint.references import TensorRef, as_reference, is_tensor
from vraxion_ckpt.checkpoint.source_files import StoredBytes
from vraxion_ckpt.checkpoint.tensor_dict import SCALARS, PackedFloats, TensorDict, referenced
from vraxion_ckpt.checkpoint.torch_optimizer import unbind
from vraxion_ckpt.support.checksums import THREADS
from vraxion_ckpt.wording import shortened

if TYPE_CHECKING:
    from torch import Tensor

_memcmp = ctypes.CDLL(None).memcmp  # releases the GIL and allocates no memory
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_RUN = 2**14  # entries of a list that are compared at a time

_R = TypeVar("_R")


def same_bits(a: TensorRef | Tensor, b: TensorRef | Tensor) -> bool:
    """Return whether two tensors have the same type, dtype, shape and bits. Strides may differ.

    No bytes are read if both are references to the same bytes.
    """
    x, y = as_reference(a), as_reference(b)
    if not alike(x, y):
        return False
    if x is y or refer_to_same_bytes(x, y):
        return True
    one, other = bytes_of(x), bytes_of(y)
    return one.data_ptr() == other.data_ptr() or _memcmp(one.data_ptr(), other.data_ptr(), len(one)) == 0


def alike(a: TensorRef, b: TensorRef) -> bool:
    """Return whether two tensors have the same type, dtype and shape."""
    same_kind = a.parameter == b.parameter and a.requires_grad == b.requires_grad
    return same_kind and a.dtype == b.dtype and a.shape == b.shape


def refer_to_same_bytes(a: TensorRef, b: TensorRef) -> bool:
    """Return whether two references are to the same bytes in the same layout, so that their values are the same."""
    if (a.first, a.strides, a.conj, a.neg) != (b.first, b.strides, b.conj, b.neg):
        return False
    x, y = a.storage, b.storage
    return x is y or (
        isinstance(x, StoredBytes)
        and isinstance(y, StoredBytes)
        and x.given is None
        and y.given is None
        and (x.file.fingerprint, x.start, x.nbytes) == (y.file.fingerprint, y.start, y.nbytes)
    )


Same = Callable[[TensorRef, TensorRef], bool]


def differences(a: Any, b: Any, key: str = "", *, same: Same = same_bits) -> Iterator[str]:
    """Yield one line, with a key, for each difference between two plain values. The order of dict entries counts."""
    if type(a) not in PLAIN_TYPES or type(b) not in PLAIN_TYPES:
        a, b = stand_in_of(a), stand_in_of(b)
    if isinstance(a, TensorDict) or isinstance(b, TensorDict):
        a, b = (value.as_stored() if isinstance(value, TensorDict) else value for value in (a, b))
        yield from differences(a, b, key, same=same)
    elif isinstance(a, PackedFloats) or isinstance(b, PackedFloats):
        if type(a) is not type(b) or a.tobytes() != b.tobytes():
            yield from differences(referenced(a), referenced(b), key, same=same)
    elif is_tensor(a) and is_tensor(b):
        if not same(as_reference(a), as_reference(b)):
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
        if not _same_keys([*a], [*b]):
            yield f"{key}: entries or their order differ ({_first_difference([*a], [*b])})"
        elif not _same_records([*a.values()], [*b.values()]):
            for name, x, y in zip(a, a.values(), b.values(), strict=True):
                if type(x) is TensorRef and type(y) is TensorRef and same(x, y):
                    continue  # as nearly all, of which there may be thousands
                yield from differences(x, y, f"{key}.{name}" if key else str(name), same=same)
    elif isinstance(a, set):
        if not _same_keys(in_fixed_order(a), in_fixed_order(b)):
            yield f"{key}: {_brief(a)} ≠ {_brief(b)}"
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{key}: {len(a)} ≠ {len(b)} entries"
        else:
            for i, x, y in unlike_entries(a, b):
                yield from differences(x, y, f"{key}[{i}]", same=same)
    elif isinstance(a, float | complex):
        if _bits(a) != _bits(b):
            yield f"{key}: {a!r} ≠ {b!r}"
    elif a != b:
        yield f"{key}: {_brief(a)} ≠ {_brief(b)}"


def _bits(number: float | complex) -> bytes:
    return struct.pack("<2d", number.real, number.imag)


def _same_keys(a: list[Any], b: list[Any]) -> bool:
    """Return whether two lists of keys are the same. 1, 1.0 and True are not, but keys of Python would be equal."""
    if {str}.issuperset(map(type, (*a, *b))):
        return a == b
    return len(a) == len(b) and not any(differences(a, b))


def unlike_entries(a: Sequence[Any], b: Sequence[Any]) -> Iterator[tuple[int, Any, Any]]:
    """Yield index and both entries of two lists of the same length, except runs of identical numbers and strings."""
    for first in range(0, len(a), _RUN):
        one, other = a[first : first + _RUN], b[first : first + _RUN]
        if not _same_scalars(one, other):
            yield from zip(range(first, len(a)), one, other, strict=False)


def _same_scalars(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Return whether two lists hold only scalars, and hold the same. Floats are compared by their bits."""
    kinds = set(map(type, a))
    if not kinds <= SCALARS or list(map(type, a)) != list(map(type, b)):
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
    yield from differences(a.state_references(), b.state_references(), "model", same=same)
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
        yield from differences(a.optimizer.parts, b.optimizer.parts, "optimizer parts", same=same)
    for name in ("payload", "lifecycle", "plan", "history"):
        yield from differences(getattr(a, name), getattr(b, name), name, same=same)


def _same_records(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Return whether two lists hold only instances of one dataclass, whose fields are equal scalars or empty dicts."""
    (kind, *others) = {*map(type, a), *map(type, b)} or (None,)
    if others or not is_dataclass(kind):
        return False
    columns = ([[*map(attrgetter(each.name), side)] for side in (a, b)] for each in fields(kind) if each.compare)
    return all(_same_scalars(*pair) or _are_empty_dicts(*pair) for pair in columns)


def _are_empty_dicts(*columns: Sequence[Any]) -> bool:
    return all({dict}.issuperset(map(type, column)) and not any(column) for column in columns)


def in_threads(function: Callable[..., _R], items: Sequence[tuple[Any, ...]]) -> list[_R]:
    """Return the results of a function for several tuples of arguments, computed on all cores."""
    if len(items) < 2:
        return [function(*item) for item in items]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda item: function(*item), items))


def without_experts(checkpoint: Checkpoint, ids: Collection[int]) -> Checkpoint:
    """Return a checkpoint without the tensors of some experts, so that they are neither compared nor opened."""
    if checkpoint.head is None or not ids:
        return checkpoint
    experts = {i: expert for i, expert in checkpoint.head.experts.items() if i not in ids}
    return replace(checkpoint, head=replace(checkpoint.head, experts=experts))


def _brief(value: Any) -> str:
    if is_tensor(value):
        return dtype_and_shape(value)
    return shortened(repr(value), 60)


def _first_difference(a: list[Any], b: list[Any]) -> str:
    pairs = ((x, y) for x, y in zip([*a, None], [*b, None], strict=False) if not _same_keys([x], [y]))
    x, y = next(pairs, (None, None))
    return f"{x!r} ≠ {y!r}"
