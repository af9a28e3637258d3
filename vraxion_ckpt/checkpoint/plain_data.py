"""Only plain data: what a loader reads without running anything, and a converter can vouch for.

That is dicts, lists, tuples, text, numbers, None, and dense tensors whose elements lie in their own storage.
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
# A place in a structure: the place of what holds it, and its key there. Spelt out only for an error.
_Place = tuple[Any, Any] | None


def check_plain(value: Any, path: Path | None = None) -> None:
    """Refuse whatever a converter cannot vouch for; what remains is safe for any loader.

    Raises:
        UnsupportedError: an object that is not plain data, or a sparse, quantised, nested, meta or subclass
            tensor, or one with attributes.
        LimitError: nesting deeper than 100, more than five million values, or a tensor that repeats or exceeds
            its storage.
        InconsistentError: a dict key that is neither text nor a whole number.
    """
    _measure(value, path, 0, None, {})


def _measure(
    item: Any, path: Path | None, depth: int, place: _Place, seen: dict[int, tuple[int, int]]
) -> tuple[int, int]:
    """Check one item; return how many values it holds and how many levels of containers.

    What was `seen`, by id, is counted again but not looked at again: lists that share lists may hold more values
    than could ever be walked through.
    """
    kind = type(item)
    if kind in _SCALARS:
        return 1, 0
    if kind is Tensor or kind is nn.Parameter:
        _check_tensor(item, path, place)
        return 1, 0
    if kind not in (dict, OrderedDict, list, tuple):
        message = f"is a {kind.__module__}.{kind.__qualname__}; only plain data can be carried"
        raise UnsupportedError(message, path=path, key=_spell(place))
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
        raise LimitError(f"holds more than {_MOST_NODES} values", path=path, key=_spell(place))
    return nodes, levels


def named_tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor inside a plain value with the path that leads there."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict | list | tuple):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(entry, Tensor | dict | list | tuple):  # of numbers there may be millions
                yield from named_tensors(entry, f"{place}.{key}" if place else str(key))
        if isinstance(value, OrderedDict) and vars(value):
            yield from named_tensors(vars(value), f"{place} attributes")


def size_of(value: Any) -> int:
    """Return how many bytes the tensors inside a plain value take."""
    return sum(tensor.numel() * tensor.itemsize for _, tensor in named_tensors(value))


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name, like ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_and_shape(tensor: Tensor) -> str:
    """Return a tensor's dtype and shape in words, like ``float32 [4, 8]``."""
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def bytes_of(tensor: Tensor) -> Tensor:
    """Return a tensor's elements as they are stored, uint8 of one dimension; a copy only if they do not lie so."""
    if not tensor.numel():  # whose strides may be such that it has no view as bytes
        return torch.empty(0, dtype=torch.uint8)
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # `view(-1)` would keep the stride of a single element, which may be any number.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def in_pieces(*tensors: Tensor, size: int = 2**20) -> Iterator[tuple[Tensor, ...]]:
    """Yield the elements of tensors, so many of each at a time, so that what is made of them takes little memory.

    Args:
        tensors: all of one number of elements.
        size: how many elements of each.

    Yields:
        tensors of one dimension, one of each; views, if the tensors are contiguous.
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, len(flat[0]), size):
        yield tuple(one[start : start + size] for one in flat)


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's elements as they are stored."""
    return zlib.crc32(bytes_of(tensor).numpy().data)


def _check_keys(item: dict[Any, Any], path: Path | None, place: _Place) -> None:
    for key in item:
        if type(key) not in (str, int):
            raise InconsistentError(
                f"has a key of type {type(key).__name__}, not text", path=path, key=_spell(place) or "top level"
            )


def _check_tensor(tensor: Tensor, path: Path | None, place: _Place) -> None:
    def refuse(error: type[CkptError], message: str) -> NoReturn:
        raise error(message, path=path, key=_spell(place))

    if tensor.is_nested:  # which has a strided layout, but no shape
        refuse(UnsupportedError, "is a nested tensor")
    if tensor.layout != torch.strided:
        refuse(UnsupportedError, f"is a sparse tensor ({tensor.layout})")
    if tensor.is_quantized:
        refuse(UnsupportedError, "is a quantised tensor")
    if tensor.device.type != "cpu":
        refuse(UnsupportedError, f"is a tensor without data (on device {tensor.device})")
    if vars(tensor):
        refuse(UnsupportedError, f"has attributes ({', '.join(vars(tensor))}); only plain data can be carried")
    held = tensor.untyped_storage().nbytes() // tensor.itemsize
    if tensor.numel() > held:
        refuse(LimitError, f"repeats its storage: {tensor.numel()} elements from {held}")
    if any(size > 2**48 for size in tensor.shape):
        refuse(LimitError, f"has an absurd shape {list(tensor.shape)}")
    if not tensor.is_contiguous() and _overlaps(tensor):
        refuse(LimitError, "repeats its storage: elements overlap")


def _overlaps(tensor: Tensor) -> bool:
    """Tell whether two elements of a strided tensor may lie on each other."""
    reach = 0  # the farthest element of the dimensions looked at so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _spell(place: _Place) -> str | None:
    parts: list[str] = []
    while place is not None:
        place, key = place
        parts.append(f"[{key}]" if isinstance(key, int) else f".{key}")
    text = "".join(reversed(parts)).removeprefix(".")
    return shortened(text, 200) or None


def as_comparable(tensor: Tensor) -> Tensor | None:
    """Return a tensor that torch can compare with a number: itself, or its values if it has a dtype of one byte."""
    return as_numbers(tensor) if tensor.itemsize == 1 else tensor


def as_numbers(tensor: Tensor) -> Tensor | None:
    """Return a tensor's values as float64 or complex128; None for a dtype that torch cannot calculate with."""
    try:
        return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    except NotImplementedError:  # packed floats of four bits
        return None
