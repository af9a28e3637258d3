"""Plain data: the values that loaders can read without executing code.

Plain data are dicts, Counters, lists, tuples, sets, strings, bytes, numbers, None, and dense CPU tensors whose storage
holds all elements. A tensor is a `TensorRef` or a `torch.Tensor`. Other values of torch and numpy are plain data if
they have a stand-in (`vraxion_ckpt.checkpoint.foreign_values`). Imports without torch.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vraxion_ckpt.checkpoint.foreign_values import FOREIGN, NumpyArray, stand_in_of
from vraxion_ckpt.checkpoint.references import ITEMSIZES, TensorRef, as_reference, contiguous_strides, is_tensor
from vraxion_ckpt.checkpoint.source_files import StoredBytes
from vraxion_ckpt.checkpoint.tensor_dict import OTHER_SCALARS, SCALARS, PackedFloats, TensorDict
from vraxion_ckpt.errors import InconsistentError, LimitError, UnsupportedError
from vraxion_ckpt.support.checksums import crc32
from vraxion_ckpt.wording import shortened

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MOST_NODES = 5_000_000
DEEPEST = 100

# Position in a nested value: the position of the container, and the key in it. Formatted only for error messages.
_Place = tuple[Any, Any] | None
_METHODS = frozenset(dir(OrderedDict))
# Types of values that may be keys, besides tuples of them.
_KEYS = (SCALARS | OTHER_SCALARS) - {bytearray, NumpyArray}
_CONTAINERS: frozenset[type] = frozenset({dict, OrderedDict, Counter, list, tuple, set, TensorDict, PackedFloats})
# Types of all plain data in files; plugins may also hand over values of torch and numpy.
PLAIN_TYPES = SCALARS | OTHER_SCALARS | _CONTAINERS | {TensorRef}


@dataclass(frozen=True)
class NotPlain:
    """A stand-in for a value in a file that is not plain data.

    Attributes:
        description: what it is, such as ``is a sparse tensor``, for the message of `check_plain`.
    """

    description: str

    def __setstate__(self, _: object) -> None:
        """Ignore the state that a pickle gives it."""


def check_plain(value: Any, path: Path | None = None) -> None:
    """Raise an error unless a value is plain data.

    Raises:
        UnsupportedError: the value holds an object of another class, or a tensor that is sparse, quantised, nested,
            not on the CPU, of a subclass, or has attributes.
        LimitError: nesting is deeper than 100, there are more than five million values, or a tensor repeats or
            exceeds its storage.
        InconsistentError: a key, or an entry of a set, is something else than text, bytes, a number, None, a value of
            torch or numpy that is not an array, or a tuple of these.
    """
    _measure(value, path, 0, None, {})


def _measure(
    item: Any, path: Path | None, depth: int, place: _Place, seen: dict[int, tuple[int, int, Any]]
) -> tuple[int, int]:
    """Check one item. Return the number of values in it and its depth of nested containers.

    `seen` has the result and the container by the container's ``id()``. Lists that share nested lists may hold
    exponentially many values, so each container is visited once, but counted wherever it occurs.
    """
    kind = type(item)
    if kind in SCALARS:
        return 1, 0
    if kind is TensorRef or _is_plain_tensor_type(kind):
        problem = _problem(item)
        if problem is not None:
            raise problem.with_facts(path=path, key=_path_text(place))
        return 1, 0
    if kind not in _CONTAINERS:
        if kind in OTHER_SCALARS or type(stand_in_of(item)) in FOREIGN:
            return 1, 0
        what = item.description if isinstance(item, NotPlain) else f"is a {kind.__module__}.{kind.__qualname__}"
        raise UnsupportedError(f"{what}; only plain data can be written", path=path, key=_path_text(place))
    if id(item) not in seen:
        if depth >= DEEPEST:
            raise LimitError(f"is nested deeper than {DEEPEST}", path=path)
        entries: Iterable[tuple[Any, Any]] = ()
        if kind is list or kind is tuple:
            entries = () if SCALARS.issuperset(map(type, item)) else enumerate(item)
        elif kind is set:
            _check_keys(item, path, place)
        elif kind is not PackedFloats:
            _check_keys(item, path, place)
            entries = _entries(item, kind, path, place)
        nodes, levels = 1 + len(item), 0
        for key, entry in entries:
            if type(entry) in SCALARS or (type(entry) is TensorRef and _problem(entry) is None):
                continue
            below, deep = _measure(entry, path, depth + 1, (place, key), seen)
            nodes, levels = nodes + below - 1, max(levels, deep)
        seen[id(item)] = nodes, levels + 1, item
    nodes, levels, _ = seen[id(item)]
    if depth + levels > DEEPEST:
        raise LimitError(f"is nested deeper than {DEEPEST}", path=path)
    if nodes > _MOST_NODES:
        raise LimitError(f"holds more than {_MOST_NODES} values", path=path, key=_path_text(place))
    return nodes, levels


def _is_plain_tensor_type(kind: type) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and (kind is torch.Tensor or kind is torch.nn.Parameter)


def _entries(item: dict[Any, Any], kind: type, path: Path | None, place: _Place) -> Iterable[tuple[Any, Any]]:
    if kind is TensorDict:
        return item.as_stored().items()  # type: ignore[attr-defined,no-any-return]
    if kind is dict or kind is Counter:
        return () if SCALARS.issuperset(map(type, item.values())) else item.items()
    attributes = vars(item)
    if not _METHODS.isdisjoint(attributes):
        message = "has attributes that hide methods of an OrderedDict"
        raise InconsistentError(message, path=path, key=_path_text(place) or "top level")
    return [*item.items(), *([("<attributes>", attributes)] if attributes else ())]


def named_tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in a plain value with its path, such as ``ema.head.weight``."""
    return ((name, ref.tensor()) for name, ref in named_references(value, place))


def named_references(value: Any, place: str = "") -> Iterator[tuple[str, TensorRef]]:
    """Yield the reference of every tensor in a plain value with its path, such as ``ema.head.weight``."""
    return ((name, as_reference(tensor)) for name, tensor in _tensors_in(value, place))


def _tensors_in(value: Any, place: str = "") -> list[tuple[str, TensorRef | Tensor]]:
    found: list[tuple[str, TensorRef | Tensor]] = []
    _collect(value, place, found)
    return found


def _collect(value: Any, place: str, found: list[tuple[str, TensorRef | Tensor]]) -> None:
    if isinstance(value, TensorDict):
        value = value.as_stored()
    if isinstance(value, dict | list | tuple):
        if SCALARS.issuperset(map(type, value)) and not isinstance(value, dict):
            return  # there may be millions
        start = f"{place}." if place else ""
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            kind = type(entry)
            if kind is TensorRef:
                found.append((f"{start}{key}", entry))
            elif kind not in SCALARS:
                _collect(entry, f"{start}{key}", found)
        if isinstance(value, OrderedDict) and vars(value):
            _collect(vars(value), f"{place} attributes", found)
    elif is_tensor(value):
        found.append((place, value))


def size_of(value: Any) -> int:
    """Return the size in bytes of all tensors in a plain value."""
    return sum(tensor.numel() * tensor.itemsize for _, tensor in _tensors_in(value))


def in_fixed_order(values: Iterable[Any]) -> list[Any]:
    """Return the entries of a set, in an order that depends on nothing but the entries."""

    def place(value: Any) -> tuple[str, str]:
        stand_in = stand_in_of(value)
        return type(stand_in).__name__, repr(stand_in)

    return sorted(values, key=place)


def dtype_name(dtype: torch.dtype | str) -> str:
    """Return a dtype's name, like ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_and_shape(tensor: TensorRef | Tensor) -> str:
    """Return a tensor's dtype and shape as text, like ``float32 [4, 8]``."""
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def bytes_of(tensor: TensorRef | Tensor) -> Tensor:
    """Return the bytes of a tensor's elements, uint8 of shape ``[n]``. Copies only if the tensor is not contiguous."""
    import torch

    if isinstance(tensor, TensorRef):
        tensor = tensor.read_only_tensor()
    if not tensor.numel():  # its strides may not allow a view as bytes
        return torch.empty(0, dtype=torch.uint8)
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # `view(-1)` would keep the arbitrary stride of a single element.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def in_pieces(*tensors: Tensor, size: int = 2**20) -> Iterator[tuple[Tensor, ...]]:
    """Yield flat pieces of several tensors, so that temporaries stay small.

    Args:
        tensors: tensors with the same number of elements.
        size: number of elements in a piece.

    Yields:
        one 1-D piece of each tensor. It is a view if the tensor is contiguous.
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, len(flat[0]), size):
        yield tuple(one[start : start + size] for one in flat)


def checksum(tensor: TensorRef | Tensor) -> int:
    """Return the CRC-32 of the bytes of a tensor's elements. It is not computed if a file states it."""
    ref = as_reference(tensor)
    storage = ref.storage
    if isinstance(storage, StoredBytes) and storage.given is None and storage.crc is not None and ref.fills_storage():
        return storage.crc
    return crc32(bytes_of(ref).numpy().data)


def _check_keys(item: Iterable[Any], path: Path | None, place: _Place) -> None:
    if {str, int}.issuperset(map(type, item)):
        return
    for key in item:
        if (wrong := _wrong_key(key, 0)) is not None:
            name = "Tensor" if is_tensor(wrong) else type(wrong).__name__
            what = "an entry" if isinstance(item, set) else "a key"
            message = f"has {what} of type {name}; it must be text, a number, None, or a tuple of these"
            raise InconsistentError(message, path=path, key=_path_text(place) or "top level")


def _wrong_key(key: Any, depth: int) -> Any:
    """Return a value in a key that cannot be carried, or None. A key may also be an entry of a set."""
    kind = type(key)
    if kind is tuple and depth < DEEPEST:
        return next((wrong for entry in key if (wrong := _wrong_key(entry, depth + 1)) is not None), None)
    if kind in _KEYS or (not is_tensor(key) and type(stand_in_of(key)) in _KEYS):
        return None
    return key


def _problem(tensor: TensorRef | Tensor) -> UnsupportedError | LimitError | None:
    """Return an error if a tensor cannot be carried, or if its elements overlap."""
    if isinstance(tensor, TensorRef):
        return _layout_problem(tensor.shape, tensor.strides, tensor.storage.nbytes // ITEMSIZES[tensor.dtype])
    import torch

    if tensor.is_nested:  # has a strided layout but no shape
        return UnsupportedError("is a nested tensor")
    if tensor.layout != torch.strided:
        return UnsupportedError(f"is a sparse tensor ({tensor.layout})")
    if tensor.is_quantized:
        return UnsupportedError("is a quantised tensor")
    if tensor.device.type != "cpu":
        return UnsupportedError(f"is a tensor without data (on device {tensor.device})")
    if vars(tensor):
        return UnsupportedError(f"has attributes ({', '.join(vars(tensor))}); only plain data can be written")
    return _layout_problem(tuple(tensor.shape), tensor.stride(), tensor.untyped_storage().nbytes() // tensor.itemsize)


@lru_cache(maxsize=2**12)
def _layout_problem(shape: tuple[int, ...], strides: tuple[int, ...], held: int) -> LimitError | None:
    numel = prod(shape)
    if numel > held:
        return LimitError(f"repeats its storage: {numel} elements, but storage for {held}")
    if any(size > 2**48 for size in shape):
        return LimitError(f"has a dimension over 2^48: shape {list(shape)}")
    if strides != contiguous_strides(shape) and _overlaps(shape, strides):
        return LimitError("repeats its storage: elements overlap")
    return None


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether two elements of a strided tensor may overlap in memory."""
    if 0 in shape:
        return False
    reach = 0  # largest offset of an element, over the dimensions so far
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _path_text(place: _Place) -> str | None:
    parts: list[str] = []
    while place is not None:
        place, key = place
        parts.append(f"[{key}]" if isinstance(key, int) else f".{key}")
    text = "".join(reversed(parts)).removeprefix(".")
    return shortened(text, 200) or None


def as_comparable(tensor: Tensor) -> Tensor | None:
    """Return the tensor, or `as_numbers` of it if its dtype has one byte, because torch may not compare such values."""
    return as_numbers(tensor) if tensor.itemsize == 1 else tensor


def as_numbers(tensor: Tensor) -> Tensor | None:
    """Return a tensor's values as float64 or complex128, or None for a dtype that torch cannot convert."""
    import torch

    try:
        return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    except NotImplementedError:  # packed 4-bit floats
        return None
