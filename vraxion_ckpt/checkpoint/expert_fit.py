"""Compare the tensors of experts of one head. Loaders silently skip an expert that does not fit the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vraxion_ckpt.checkpoint.plain_data import dtype_and_shape
from vraxion_ckpt.checkpoint.references import TensorRef, as_reference

if TYPE_CHECKING:
    from torch import Tensor


def unfit(
    expert: Mapping[str, TensorRef | Tensor],
    sibling: Mapping[str, TensorRef | Tensor],
    whose: tuple[str, str],
    *,
    same_widths: bool = False,
) -> Iterator[tuple[str | None, str]]:
    """Yield the differences that prevent two experts from belonging to one head.

    Experts of one head have the same leaves with the same dtypes. The tensors of linear experts also have the same
    shapes. Experts with inner layers may have different hidden widths.

    Args:
        expert: tensors or references of the first expert by leaf name.
        sibling: those of the second expert by leaf name.
        whose: how the text names the first and the second expert.
        same_widths: whether hidden widths must be equal, too.

    Yields:
        the leaf name, and the difference as text. The leaf name is None if the experts have different leaves.
    """
    lacking = ((*whose, sibling.keys() - expert.keys()), (*reversed(whose), expert.keys() - sibling.keys()))
    lines = [
        f"{one} lacks {', '.join(sorted(map(str, found)))}, which {other} has" for one, other, found in lacking if found
    ]
    if lines:
        yield None, "; ".join(lines)
        return
    for leaf in expert:
        tensor, other = as_reference(expert[leaf]), as_reference(sibling[leaf])
        same = tensor.ndim == other.ndim if "." in leaf and not same_widths else tensor.shape == other.shape
        if not same or tensor.dtype != other.dtype:
            yield leaf, f"is {dtype_and_shape(tensor)} in {whose[0]}, {dtype_and_shape(other)} in {whose[1]}"
