"""Plain data: the values that loaders can read without executing code.

Plain data are dicts, lists, tuples, strings, numbers, None, and dense CPU tensors whose storage holds all elements.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vraxion_ckpt.errors import CkptError, InconsistentError, LimitError, UnsupportedError
from vraxion_ckpt.wording import shortened

_MOST_NODES = 5_000_000
DEEPEST = 100

_SCALARS = frozenset({str, int, float, bool, type(None)})
# Position in a nested value: the position of the container, and the key in it. Formatted only for error messages.
_Place = tuple[Any, Any] | None


def check_plain(value: Any, path: Path | None = None) -> None:
    """Raise an error unless a value is plain data.

    Raises:
        UnsupportedError: the value holds an object of another class, or a tensor that is sparse, quantised, nested,
            not on the CPU, of a subclass, or has attributes.
        LimitError: nesting is deeper than 100, there are more than five million values, or a tensor repeats or
            exceeds its storage.
        InconsistentError: a dict key is neither a string nor an integer.
    """
    _measure(value, path, 0, None, {})


def _measure(
    item: Any, path: Path | None, depth: int, place: _Place, seen: dict[int, tuple[int, int]]
) -> tuple[int, int]:
    """Check one item. Return the number of values in it and its depth of nested containers.

    `seen` caches the result by the container's ``id()``. Lists that share nested lists may hold exponentially many
    values, so each container is visited once, but counted wherever it occurs.
    """
    kind = type(item)
    if kind in _SCALARS:
        return 1, 0
    if kind is Tensor or kind is nn.Parameter:
        _check_tensor(item, path, place)
        return 1, 0
    if kind not in (dict, OrderedDict, list, tuple):
        message = f"is a {kind.__module__}.{kind.__qualname__}; only plain data can be written"
        raise UnsupportedError(message, path=path, key=_path_text(place))
    if id(item) not in seen:
        if depth >= DEEPEST:
            raise LimitError(f"is nested deeper than {DEEPEST}", path=path)
        entries: Iterable[tuple[Any, Any]] = ()
        if kind is dict or kind is OrderedDict:
            _check_keys(item, path, place)
            attributes = vars(item) if kind is OrderedDict else None
            entries = [*item.items(), *([("<attributes>", attributes)] if attributes else ())]
        elif not _SCALARS.issuperset(map(type, item)):
            entries = enumerate(item)
        nodes, levels = 1 + len(item), 0
        for key, entry in entries:
            below, deep = _measure(entry, path, depth + 1, (place, key), seen)
            nodes, levels = nodes + below - 1, max(levels, deep)
        seen[id(item)] = nodes, levels + 1
    nodes, levels = seen[id(item)]
    if depth + levels > DEEPEST:
        raise LimitError(f"is nested deeper than {DEEPEST}", path=path)
    if nodes > _MOST_NODES:
        raise LimitError(f"holds more than {_MOST_NODES} values", path=path, key=_path_text(place))
    return nodes, levels


def named_tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in a plain value with its path, such as ``ema.head.weight``."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, list | tuple) and _SCALARS.issuperset(map(type, value)):
        return  # there may be millions of numbers
    elif isinstance(value, dict | list | tuple):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(entry, Tensor | dict | list | tuple):
                yield from named_tensors(entry, f"{place}.{key}" if place else str(key))
        if isinstance(value, OrderedDict) and vars(value):
            yield from named_tensors(vars(value), f"{place} attributes")


def size_of(value: Any) -> int:
    """Return the size in bytes of all tensors in a plain value."""
    return sum(tensor.numel() * tensor.itemsize for _, tensor in named_tensors(value))


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name, like ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_and_shape(tensor: Tensor) -> str:
    """Return a tensor's dtype and shape as text, like ``float32 [4, 8]``."""
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor's elements, uint8 of shape ``[n]``. Copies only if the tensor is not contiguous."""
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


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of the bytes of a tensor's elements."""
    return zlib.crc32(bytes_of(tensor).numpy().data)


def _check_keys(item: dict[Any, Any], path: Path | None, place: _Place) -> None:
    for key in item:
        if type(key) not in (str, int):
            raise InconsistentError(
                f"has a key of type {type(key).__name__}; not a string", path=path, key=_path_text(place) or "top level"
            )


def _check_tensor(tensor: Tensor, path: Path | None, place: _Place) -> None:
    def refuse(error: type[CkptError], message: str) -> NoReturn:
        raise error(message, path=path, key=_path_text(place))

    if tensor.is_nested:  # has a strided layout but no shape
        refuse(UnsupportedError, "is a nested tensor")
    if tensor.layout != torch.strided:
        refuse(UnsupportedError, f"is a sparse tensor ({tensor.layout})")
    if tensor.is_quantized:
        refuse(UnsupportedError, "is a quantised tensor")
    if tensor.device.type != "cpu":
        refuse(UnsupportedError, f"is a tensor without data (on device {tensor.device})")
    if vars(tensor):
        refuse(UnsupportedError, f"has attributes ({', '.join(vars(tensor))}); only plain data can be written")
    held = tensor.untyped_storage().nbytes() // tensor.itemsize
    if tensor.numel() > held:
        refuse(LimitError, f"repeats its storage: {tensor.numel()} elements, but storage for {held}")
    if any(size > 2**48 for size in tensor.shape):
        refuse(LimitError, f"has a dimension over 2^48: shape {list(tensor.shape)}")
    if not tensor.is_contiguous() and _overlaps(tensor):
        refuse(LimitError, "repeats its storage: elements overlap")


def _overlaps(tensor: Tensor) -> bool:
    """Return whether two elements of a strided tensor may overlap in memory."""
    reach = 0  # largest offset of an element, over the dimensions so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
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
    try:
        return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    except NotImplementedError:  # packed 4-bit floats
        return None
