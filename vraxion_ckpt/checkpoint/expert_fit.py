"""Whether an expert fits its siblings: a loader skips one that does not, without a message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from vraxion_ckpt.checkpoint.plain_data import dtype_and_shape


def unfit(
    expert: Mapping[str, Tensor], sibling: Mapping[str, Tensor], whose: tuple[str, str], *, same_widths: bool = False
) -> Iterator[tuple[str | None, str]]:
    """Yield what in an expert does not fit another expert of the same head.

    Experts of one head have the same leaves with the same dtypes. Those of plain linear experts have the same shapes,
    too; the hidden widths of experts with inner layers may differ.

    Args:
        expert: its tensors by leaf name.
        sibling: those of the other expert.
        whose: what to call the two in the text.
        same_widths: whether hidden widths must be the same, too.

    Yields:
        the leaf, and what does not fit; the leaf is None where the two have different leaves.
    """
    lacking = ((*whose, sibling.keys() - expert.keys()), (*reversed(whose), expert.keys() - sibling.keys()))
    lines = [
        f"{one} lacks {', '.join(sorted(map(str, found)))}, which {other} has" for one, other, found in lacking if found
    ]
    if lines:
        yield None, "; ".join(lines)
        return
    for leaf, tensor in expert.items():
        other = sibling[leaf]
        same = tensor.ndim == other.ndim if "." in leaf and not same_widths else tensor.shape == other.shape
        if not same or tensor.dtype != other.dtype:
            yield leaf, f"is {dtype_and_shape(tensor)} in {whose[0]}, {dtype_and_shape(other)} in {whose[1]}"
