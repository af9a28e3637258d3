"""Which tensors share memory.

Two tensors share memory when the bytes between the first and the last element of one overlap those of the other. They
are tied when each is the same view of that memory: first byte, dtype, shape and strides are equal. An empty tensor
shares memory with none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor

from vraxion_ckpt.checkpoint.source_files import Extent

_K = TypeVar("_K")


def extent(tensor: Tensor) -> Extent:
    """Return the address of a tensor's first element, and how many bytes it is from there to the end of the last."""
    if not tensor.numel():
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.itemsize


def view_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors that are not empty have in common if, and only if, they are tied.

    The stride of a dimension with a single entry says nothing.
    """
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.dtype, tensor.shape, strides, tensor.is_conj(), tensor.is_neg()


def sharing(named: Iterable[tuple[_K, Tensor]]) -> list[list[tuple[_K, Tensor]]]:
    """Group tensors that share memory, directly or through another of the group; leave out those that share none.

    Returns:
        groups in the order of their first members; in a group, tensors in the order given.
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
    """Return the tensors that are not tied to an earlier one, as ``named_parameters()`` of torch does."""
    seen: set[tuple[Any, ...]] = set()
    found = []
    for name, tensor in named:
        view = view_of(tensor)
        if not tensor.numel() or view not in seen:
            found.append((name, tensor))
        seen.add(view)
    return found


def fills_storage(tensor: Tensor) -> bool:
    """Tell whether a tensor's storage holds its elements and nothing else."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
