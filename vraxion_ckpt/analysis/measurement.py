"""Measure the difference between tensors of the same shape."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vraxion_ckpt.checkpoint.plain_data import as_numbers, bytes_of, in_pieces
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.ring import Ints
from vraxion_ckpt.support.json_models import Fact, Number

if TYPE_CHECKING:
    from torch import Tensor

_LOW = 2**32 - 1
_Integers = NDArray[Any]


class Measure(Fact):
    """The difference between two tensors, or between two lists of tensors, each taken as one vector."""

    elements: int
    """Number of elements that are not bit-identical."""
    of: int
    """Number of all elements."""
    not_finite: int
    """Number of differing elements that are infinite or NaN on either side. The following values ignore them."""
    max_abs: Number | None
    """The largest absolute difference; null if no differing element is finite on both sides."""
    relative_l2: Number | None
    """‖b − a‖ / ‖a‖ over all finite elements; null if a is zero, and for integers."""
    cosine: Number | None
    """a·b / (‖a‖ ‖b‖) over all finite elements; null if either is zero, and for integers."""

    def __str__(self) -> str:
        parts = [f"{self.elements} of {self.of} elements"]
        if self.max_abs is not None:
            parts.append(f"max-abs {self.max_abs:.3g}")
        if self.relative_l2 is not None:
            parts.append(f"relative L2 {self.relative_l2:.3g}")
        if self.cosine is not None:
            near = 1 - self.cosine
            parts.append(f"cosine 1 − {near:.1g}" if 0 < near < 1e-3 else f"cosine {self.cosine:.4g}")
        if self.not_finite:
            parts.append(f"{self.not_finite} not finite")
        return ", ".join(parts)


def measure(pairs: Iterable[tuple[TensorRef, TensorRef]]) -> Measure | None:
    """Measure the difference between the first and the second tensors of pairs, each side taken as one vector.

    Tensors are read in pieces and summed in float64. Tensors of different dtypes are compared by value.

    Returns:
        The difference, or None if the tensors of a pair have different shapes.
    """
    import torch

    held = list(pairs)
    if any(a.shape != b.shape for a, b in held):
        return None
    whole = not any(t.is_floating_point() or t.is_complex() for pair in held for t in pair)
    scale = 1.0 if whole else _largest(held)  # avoids overflow and underflow of the squares
    elements = of = not_finite = 0
    largest: float | None = None
    squares = [0.0, 0.0, 0.0]  # of a, of b, of b − a
    dot = 0.0
    for a, b in held:
        of += a.numel()
        for x, y in in_pieces(a.read_only_tensor(), b.read_only_tensor()):
            differ = _differ(x, y)
            mask = differ.numpy()
            number = int(np.count_nonzero(mask))  # torch takes longer to count
            elements += number
            if whole:
                if number:
                    largest = max(largest or 0.0, _exact_gap(x.detach().numpy()[mask], y.detach().numpy()[mask]))
                continue
            one, other = _as_numbers(x, y)
            if one is None or other is None:
                continue
            finite = one.isfinite() & other.isfinite()
            not_finite += int((differ & ~finite).sum())
            if bool((differ & finite).any()):
                largest = max(largest or 0.0, float((other - one)[differ & finite].abs().max()))
            one, other = one[finite] / scale, other[finite] / scale
            for i, part in enumerate((one, other, other - one)):
                squares[i] += float(part.abs().square().sum())
            dot += float(torch.vdot(one, other).real)
    norm_a, norm_b, norm_gap = map(math.sqrt, squares)
    cosine = dot / (norm_a * norm_b) if norm_a and norm_b else None
    return Measure(
        elements=elements,
        of=of,
        not_finite=not_finite,
        max_abs=largest,
        relative_l2=norm_gap / norm_a if norm_a else None,
        cosine=None if cosine is None else min(1.0, max(-1.0, cosine)),
    )


def _largest(pairs: Iterable[tuple[TensorRef, TensorRef]]) -> float:
    """Return the largest finite magnitude, or 1 if it is zero."""
    found = 0.0
    for pair in pairs:
        for tensor in pair:
            for (piece,) in in_pieces(tensor.read_only_tensor()):
                numbers = as_numbers(piece)
                if numbers is not None and numbers.numel():
                    sizes = numbers.abs()
                    found = max(found, float(sizes.masked_fill(~sizes.isfinite(), 0).max()))
    return found or 1.0


def _as_numbers(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    one, other = as_numbers(x), as_numbers(y)
    if one is None or other is None:
        return None, None
    if one.is_complex() != other.is_complex():
        wide = one.dtype if one.is_complex() else other.dtype
        return one.to(wide), other.to(wide)
    return one, other


def _exact_gap(x: _Integers, y: _Integers) -> float:
    """Return the largest difference of integers, computed exactly because int64 exceeds the precision of float64."""
    if max(int(x.max()), int(y.max())) - min(int(x.min()), int(y.min())) < 2**63:
        return float(np.abs(x.astype(np.int64) - y.astype(np.int64)).max())
    (x_high, x_low), (y_high, y_low) = _halves(x), _halves(y)
    low = x_low - y_low
    high = x_high - y_high + (low >> 32)
    low &= _LOW
    most, least = int(high.max()), int(high.min())
    largest = (most << 32) + int(low[high == most].max())
    smallest = (least << 32) + int(low[high == least].min())
    return float(max(largest, -smallest))


def _halves(array: _Integers) -> tuple[Ints, Ints]:
    """Return the upper and the lower 32 bits of integers, so that differences of int64 and uint64 fit into int64."""
    return (array >> 32).astype(np.int64), (array & _LOW).astype(np.int64)


def _differ(x: Tensor, y: Tensor) -> Tensor:
    """Return a mask of the elements that differ: in a bit, or in value if the dtypes differ."""
    import torch

    if x.dtype != y.dtype:
        one, other = as_numbers(x), as_numbers(y)
        return torch.ones(len(x), dtype=torch.bool) if one is None or other is None else one != other
    if not (x.is_floating_point() or x.is_complex()):
        return torch.from_numpy(x.numpy() != y.numpy())  # torch does not compare every integer dtype
    return (bytes_of(x).view(-1, x.itemsize) != bytes_of(y).view(-1, y.itemsize)).any(dim=1)
