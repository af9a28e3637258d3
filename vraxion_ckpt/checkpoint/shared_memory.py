"""Find tensors that share memory.

Two tensors share memory if their byte ranges, from the first to the last element, overlap. They are tied if they are
the same view of that memory: equal first byte, dtype, shape and strides. An empty tensor shares memory with no other.
Imports without torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from vraxion_ckpt.checkpoint.references import TensorRef, as_reference

if TYPE_CHECKING:
    from torch import Tensor

_K = TypeVar("_K")
_T = TypeVar("_T", bound="TensorRef | Tensor")


def view_of(tensor: TensorRef) -> tuple[Any, ...]:
    """Return a key that two non-empty tensors have in common if and only if they are tied.

    Strides of dimensions of size 1 are ignored.
    """
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    return *tensor.extent()[:2], tensor.dtype, tensor.shape, strides, tensor.conj, tensor.neg


def sharing(named: Iterable[tuple[_K, _T]]) -> list[list[tuple[_K, _T]]]:
    """Return groups of tensors that share memory, directly or through other tensors of the group.

    Args:
        named: tensors or references with their names.

    Returns:
        groups of at least two tensors, ordered by their first tensors. The tensors of a group are in the given order.
    """
    given = list(named)
    references = [as_reference(tensor) for _, tensor in given]
    spans = sorted((*ref.extent(), number) for number, ref in enumerate(references) if ref.numel())
    groups: list[list[int]] = []
    reached = (-1, -1)  # address space and first byte after the group
    for space, start, size, number in spans:
        if (space, start) >= reached:
            groups.append([])
        groups[-1].append(number)
        reached = max(reached, (space, start + size))
    return [[given[number] for number in group] for group in sorted(map(sorted, groups)) if len(group) > 1]


def without_tied(named: Iterable[tuple[_K, _T]]) -> list[tuple[_K, _T]]:
    """Return the tensors that are not tied to an earlier one, as torch's ``named_parameters()`` does."""
    seen: set[tuple[Any, ...]] = set()
    found = []
    for name, tensor in named:
        ref = as_reference(tensor)
        view = view_of(ref)
        if not ref.numel() or view not in seen:
            found.append((name, tensor))
        seen.add(view)
    return found


def fills_storage(tensor: TensorRef | Tensor) -> bool:
    """Return whether a tensor's storage holds exactly its elements."""
    ref = as_reference(tensor)
    return ref.storage.nbytes == ref.nbytes
