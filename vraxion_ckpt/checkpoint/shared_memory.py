"""Find tensors that share memory.

Two tensors share memory if their byte ranges, from the first to the last element, overlap. They are tied if they are
the same view of that memory: equal first byte, dtype, shape and strides. An empty tensor shares memory with no other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor

from vraxion_ckpt.checkpoint.source_files import Extent

_K = TypeVar("_K")


def extent(tensor: Tensor) -> Extent:
    """Return the byte range of a tensor: address of its first element, and size up to the end of the last one."""
    if not tensor.numel():
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.itemsize


def view_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that two non-empty tensors have in common if and only if they are tied.

    Strides of dimensions of size 1 are ignored.
    """
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.dtype, tensor.shape, strides, tensor.is_conj(), tensor.is_neg()


def sharing(named: Iterable[tuple[_K, Tensor]]) -> list[list[tuple[_K, Tensor]]]:
    """Return groups of tensors that share memory, directly or through other tensors of the group.

    Args:
        named: tensors with their names.

    Returns:
        groups of at least two tensors, ordered by their first tensors. The tensors of a group are in the given order.
    """
    given = list(named)
    spans = sorted((*extent(tensor), number) for number, (_, tensor) in enumerate(given) if tensor.numel())
    groups: list[list[int]] = []
    end = -1
    for start, size, number in spans:
        if start >= end:
            groups.append([])
        groups[-1].append(number)
        end = max(end, start + size)
    return [[given[number] for number in group] for group in sorted(map(sorted, groups)) if len(group) > 1]


def without_tied(named: Iterable[tuple[_K, Tensor]]) -> list[tuple[_K, Tensor]]:
    """Return the tensors that are not tied to an earlier one, as torch's ``named_parameters()`` does."""
    seen: set[tuple[Any, ...]] = set()
    found = []
    for name, tensor in named:
        view = view_of(tensor)
        if not tensor.numel() or view not in seen:
            found.append((name, tensor))
        seen.add(view)
    return found


def fills_storage(tensor: Tensor) -> bool:
    """Return whether a tensor's storage holds exactly its elements."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
