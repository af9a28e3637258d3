"""By how much two tensors of one shape differ."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from vraxion_ckpt.facts import Fact, Number
from vraxion_ckpt.plain import as_numbers, bytes_of

_PIECE = 2**20


class Measure(Fact):
    """By how much two tensors differ, or several, taken as one."""

    elements: int
    """How many elements differ in a bit."""
    of: int
    not_finite: int
    """How many of those are infinite or NaN on either side; they are left out of what follows."""
    max_abs: Number | None
    """The largest absolute difference; null if no element that differs can be compared."""
    relative_l2: Number | None
    """‖b − a‖ / ‖a‖ over all finite elements; null if a is zero, and for whole numbers."""
    cosine: Number | None
    """a·b / (‖a‖ ‖b‖) over all finite elements; null if either is zero, and for whole numbers."""

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


def measure(pairs: Iterable[tuple[Tensor, Tensor]]) -> Measure | None:
    """Measure pairs of tensors as if each side were one vector; None if two of a pair have different shapes.

    Tensors are read a piece at a time and summed in float64; those of different dtypes are compared by value.
    """
    elements = of = not_finite = 0
    largest: float | None = None
    squares = [0.0, 0.0, 0.0]  # of a, of b, of b − a
    dot, whole = 0.0, True
    for a, b in pairs:
        if a.shape != b.shape:
            return None
        of += a.numel()
        whole = whole and not (a.is_floating_point() or a.is_complex() or b.is_floating_point() or b.is_complex())
        for x, y in _pieces(a, b):
            differ = _differ(x, y)
            elements += int(differ.sum())
            one, other = as_numbers(x), as_numbers(y)
            if one is None or other is None:
                continue
            if one.is_complex() != other.is_complex():
                one, other = one.to(torch.complex128), other.to(torch.complex128)
            finite = one.isfinite() & other.isfinite()
            not_finite += int((differ & ~finite).sum())
            gap = (other - one).abs()
            if bool((differ & finite).any()):
                largest = max(largest or 0.0, float(gap[differ & finite].max()))
            one, other, gap = one[finite], other[finite], gap[finite]
            for i, part in enumerate((one, other, gap)):
                squares[i] += float(part.abs().square().sum())
            dot += float(torch.vdot(one, other).real)
    norm_a, norm_b, norm_gap = map(math.sqrt, squares)
    return Measure(
        elements=elements,
        of=of,
        not_finite=not_finite,
        max_abs=largest,
        relative_l2=norm_gap / norm_a if norm_a and not whole else None,
        cosine=min(1.0, max(-1.0, dot / (norm_a * norm_b))) if norm_a and norm_b and not whole else None,
    )


def _pieces(a: Tensor, b: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    x, y = a.detach().reshape(-1), b.detach().reshape(-1)
    for start in range(0, len(x), _PIECE):
        yield x[start : start + _PIECE], y[start : start + _PIECE]


def _differ(x: Tensor, y: Tensor) -> Tensor:
    """Tell for each element whether it differs in a bit; of other dtypes, in its value."""
    if x.dtype != y.dtype:
        one, other = as_numbers(x), as_numbers(y)
        return torch.ones(len(x), dtype=torch.bool) if one is None or other is None else one != other
    return (bytes_of(x).view(-1, x.itemsize) != bytes_of(y).view(-1, y.itemsize)).any(dim=1)
