"""Compare the tensors of experts of one head. Loaders silently skip an expert that does not fit the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from vraxion_ckpt.checkpoint.plain_data import dtype_and_shape
from vraxion_ckpt.wording import listed


def unfit(
    expert: Mapping[str, Tensor], sibling: Mapping[str, Tensor], whose: tuple[str, str], *, same_widths: bool = False
) -> Iterator[tuple[str | None, str]]:
    """Yield the differences that prevent two experts from belonging to one head.

    Experts of one head have the same leaves with the same dtypes. The tensors of linear experts also have the same
    shapes. Experts with inner layers may have different hidden widths.

    Args:
        expert: tensors by leaf name.
        sibling: tensors of the other expert by leaf name.
        whose: the names of the two experts, for the text.
        same_widths: whether hidden widths must be equal.

    Yields:
        the leaf and the difference as text. The leaf is None if the experts have different leaves.
    """
    more = sorted(map(str, expert.keys() - sibling.keys()))
    lacking = sorted(map(str, sibling.keys() - expert.keys()))
    only = [f"{whose[0]} has {listed(more, 4)}, but {whose[1]} does not"] if more else []
    only += [f"{whose[1]} has {listed(lacking, 4)}, but {whose[0]} does not"] if lacking else []
    if only:
        yield None, "; ".join(only)
        return
    for leaf, tensor in expert.items():
        other = sibling[leaf]
        same = tensor.ndim == other.ndim if "." in leaf and not same_widths else tensor.shape == other.shape
        if not same or tensor.dtype != other.dtype:
            yield leaf, f"is {dtype_and_shape(tensor)} in {whose[0]}, {dtype_and_shape(other)} in {whose[1]}"
