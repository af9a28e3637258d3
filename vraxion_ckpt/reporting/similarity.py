"""Compute cosines and norms of experts, and find experts that are copies of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vraxion_ckpt.analysis.measurement import Measure, measure
from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.head import Expert
from vraxion_ckpt.checkpoint.plain_data import as_numbers
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.support import progress

if TYPE_CHECKING:
    from torch import Tensor

# Experts with at least this cosine are listed as copies, because a cosine of 1.000 does not show how they differ.
_COPY = 0.9995
_PIECE = 2**16


@dataclass(frozen=True)
class ExpertCopy:
    """An expert that is equal or nearly equal to another expert.

    Attributes:
        expert: the id of this expert.
        leaves: the names of the tensors that differ; empty if all are bit-identical.
        measure: the size of the difference; None if all tensors are bit-identical.
    """

    expert: int
    leaves: tuple[str, ...]
    measure: Measure | None


@dataclass(frozen=True)
class Group:
    """Experts that are copies of each other. Most groups have one member.

    Attributes:
        first: the id of the expert that the others were compared with.
        copies: the other experts of the group.
    """

    first: int
    copies: tuple[ExpertCopy, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the ids of all members."""
        return (self.first, *(copy.expert for copy in self.copies))


@dataclass(frozen=True)
class Similarity:
    """The result of a comparison of experts.

    Attributes:
        ids: the experts that were compared, in ascending order.
        norms: the Euclidean norm of all parameters of each expert, shape ``[len(ids)]``; NaN if an entry is not
            finite, has no numeric value, or is too large to be squared.
        groups: groups of experts that are copies of each other; each expert is in one group.
        cosines: the cosine between the first experts of the groups, shape ``[len(groups), len(groups)]``; NaN if
            shapes differ, or a norm is NaN or zero.
    """

    ids: tuple[int, ...]
    norms: NDArray[np.float64]
    groups: tuple[Group, ...]
    cosines: NDArray[np.float64]


def compare_experts(experts: Mapping[int, Expert], ids: Sequence[int]) -> Similarity:
    """Compare experts with each other, each as one vector of all its parameters."""
    ids = tuple(sorted(ids))
    cosines = np.full((len(ids), len(ids)), np.nan)
    norms = np.full(len(ids), np.nan)
    groups: list[Group] = []
    by_shape: dict[object, list[int]] = {}
    for place, i in enumerate(ids):
        leaves = experts[i].references()
        shapes = sorted((leaf, tensor.shape, tensor.is_complex()) for leaf, tensor in leaves.items())
        by_shape.setdefault(tuple(shapes), []).append(place)
    with progress.progress_bar("comparing experts", len(ids), "experts") as count:
        for places in by_shape.values():
            products = _products([experts[ids[place]] for place in places])
            found = np.sqrt(products.diagonal())
            norms[places] = found
            with np.errstate(divide="ignore", invalid="ignore"):
                cosines[np.ix_(places, places)] = np.clip(products / np.outer(found, found), -1, 1)
            groups += _groups({ids[place]: experts[ids[place]] for place in places}, cosines[np.ix_(places, places)])
            count(len(places))
    groups.sort(key=lambda group: group.first)
    firsts = [ids.index(group.first) for group in groups]
    return Similarity(ids, norms, tuple(groups), cosines[np.ix_(firsts, firsts)])


def _groups(experts: Mapping[int, Expert], cosines: NDArray[np.float64]) -> list[Group]:
    """Group copies. All experts must have the same shapes. `cosines` has a row for each expert, in order."""
    found: list[tuple[int, list[ExpertCopy]]] = []  # the first expert's position and the copies of each group
    ids = list(experts)
    for place, i in enumerate(ids):
        for first, copies in found:
            cosine = cosines[first, place]
            if cosine < _COPY:
                continue
            copy = _copy(experts[ids[first]], i, experts[i], measured=cosine >= _COPY)
            if cosine >= _COPY or not copy.leaves:  # if the cosine is NaN, only an identical expert is a copy
                copies.append(copy)
                break
        else:
            found.append((place, []))
    return [Group(ids[first], tuple(copies)) for first, copies in found]


def _copy(original: Expert, expert: int, copy: Expert, *, measured: bool) -> ExpertCopy:
    one, other = ({leaf: _data(ref) for leaf, ref in each.references().items()} for each in (original, copy))
    differing = [leaf for leaf in other if not same_bits(one[leaf], other[leaf])]
    pairs = [(one[leaf], other[leaf]) for leaf in differing]
    return ExpertCopy(expert, tuple(differing), measure(pairs) if measured and pairs else None)


def _data(tensor: TensorRef) -> TensorRef:
    """Return the tensor as ``torch.Tensor.detach`` does."""
    return replace(tensor, requires_grad=False, parameter=False, _tensor=None)


def _products(experts: Sequence[Expert]) -> NDArray[np.float64]:
    """Return the scalar products of experts with the same shapes, as float64 of shape ``[n, n]``."""
    import torch

    held = [expert.references() for expert in experts]
    total = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for leaf in held[0]:
        flat = [leaves[leaf].read_only_tensor().detach().reshape(-1) for leaves in held]
        for start in range(0, len(flat[0]), _PIECE):
            rows = torch.stack([_as_reals(one[start : start + _PIECE]) for one in flat])
            total += rows @ rows.T
    found: NDArray[np.float64] = total.numpy()
    return np.where(np.isfinite(found), found, np.nan)


def _as_reals(tensor: Tensor) -> Tensor:
    """Return a flat tensor as float64, with two entries for a complex number, or NaN for dtypes without values."""
    import torch

    numbers = as_numbers(tensor)
    if numbers is None:
        return torch.full((len(tensor),), torch.nan, dtype=torch.float64)
    return torch.view_as_real(numbers).reshape(-1) if numbers.is_complex() else numbers
