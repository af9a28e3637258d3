"""Check the invariants of a checkpoint, and what a chain of transforms must preserve.

`invariant_findings` checks one checkpoint. `sharing_findings` and `preservation` compare the checkpoints before and
after a chain. They return findings, and callers decide which error to raise. Only `preservation` opens closed
experts, and only those that it must compare. An expert that is the same object before and after is unchanged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.expert_fit import unfit
from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.places import value_at
from vraxion_ckpt.checkpoint.plain_data import in_pieces, named_references
from vraxion_ckpt.checkpoint.references import TensorRef, as_reference
from vraxion_ckpt.checkpoint.ring import Ints, count_pairs
from vraxion_ckpt.checkpoint.shared_memory import sharing
from vraxion_ckpt.checkpoint.source_files import StoredBytes
from vraxion_ckpt.checkpoint.torch_optimizer import known_shapes, shape_conflicts, unknown_parameters
from vraxion_ckpt.support.json_models import Number
from vraxion_ckpt.wording import count, listed, numbered

if TYPE_CHECKING:
    from torch import Tensor


def invariant_findings(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield one line for each violated invariant of a checkpoint."""
    if checkpoint.head is not None:
        yield from _head_findings(checkpoint.head)
        yield from _expert_findings(checkpoint.head)
        if checkpoint.lifecycle and set(checkpoint.lifecycle) != set(range(checkpoint.num_experts)):
            yield (
                f"lifecycle rows are for {numbered('expert', sorted(checkpoint.lifecycle), 4)}, "
                f"but the head has {count(checkpoint.num_experts, 'expert')}"
            )
    yield from _router_findings(checkpoint)
    yield from _optimizer_findings(checkpoint)


def _head_findings(head: Head) -> Iterator[str]:
    ids = [*head.experts, *head.deleted]
    present = set(ids)
    if len(ids) != len(set(ids)):
        yield f"{numbered('expert', sorted(set(head.experts) & head.deleted), 4)}: both live and deleted"
    elif present != set(range(len(ids))):
        missing = next(i for i in range(len(ids)) if i not in present)
        yield f"expert {missing} is missing, and it is not listed as deleted"
    if not head.experts:
        yield "the head has no experts"
    if head.kind is HeadKind.SINGLE and ids != [0]:
        yield f"a single head must have exactly expert 0, but has {listed(ids, 4)}"
    if len(set(map(id, head.experts.values()))) != len(head.experts):
        yield "two experts are the same object and would share their storage"


def _expert_findings(head: Head) -> Iterator[str]:
    """Compare the open experts with each other. Loaders silently skip an expert that does not fit."""
    opened = [(i, expert) for i, expert in head.experts.items() if expert.is_open]
    if not opened:
        return
    first, references = opened[0][0], opened[0][1].references()
    for i, expert in opened[1:]:
        for leaf, what in unfit(expert.references(), references, (f"expert {i}", f"expert {first}")):
            yield f"{leaf} {what}" if leaf else what


def _router_findings(checkpoint: Checkpoint) -> Iterator[str]:
    router = checkpoint.router_reference
    if router is None or checkpoint.head is None:
        return
    if router.is_floating_point() or router.is_complex() or router.dtype == "bool":
        yield f"router_map must hold integers, not {router.dtype}"
    elif router.ndim != 1 or not router.numel():
        yield f"router_map must have shape [L] with L ≥ 1, not {list(router.shape)}"
    else:
        owners = router_owners(router)
        if owners.min() < 0 or owners.max() >= checkpoint.num_experts:
            wrong = np.flatnonzero((owners < 0) | (owners >= checkpoint.num_experts))
            yield (
                f"router_map gives address {wrong[0]} to expert {owners[wrong[0]]}, but the head has "
                f"{count(checkpoint.num_experts, 'expert')}; {count(len(wrong), 'such address')} in all"
            )


def _optimizer_findings(checkpoint: Checkpoint) -> Iterator[str]:
    optimizer = checkpoint.optimizer
    if optimizer is None:
        return
    params = optimizer.params
    numbers = [group.part for group in optimizer.groups]
    if numbers != sorted(numbers) or any(not 0 <= number < len(optimizer.parts) for number in numbers):
        yield "the optimizer's param groups are not in the order of its parts"
    for part in optimizer.parts:
        if part.place and value_at(checkpoint.payload.as_stored(), part.place) is not None:
            yield f"the payload has no place for the optimizer {part}"
    if len({part.place for part in optimizer.parts}) != len(optimizer.parts):
        yield "two optimizers have the same place"
    if len(set(params)) != len(params):
        yield f"the optimizer lists {Counter(params).most_common(1)[0][0]} twice"
    for name in optimizer.state.keys() - set(params):
        yield f"the optimizer has state for {name}, which is in no param group"
    for name in unknown_parameters(checkpoint, params):
        yield f"the optimizer lists {name}, which the model does not have"
    for conflict in shape_conflicts(optimizer, known_shapes(checkpoint)):
        yield f"{conflict.name}: {conflict.what}"


def router_owners(router: TensorRef | Tensor) -> Ints:
    """Return a router map as an int64 array, shape ``[L]``. The array must not be written into."""
    ref = as_reference(router)
    if isinstance(ref.storage, StoredBytes) and ref.is_contiguous() and ref.dtype in _NUMPY_INTS:
        owners = np.empty(ref.numel(), ref.dtype)  # in larger pages than bytes, so that it is filled faster
        ref.storage.read_into(ref.first * ref.itemsize, owners.view(np.uint8).data)
        return owners.astype(np.int64, copy=False)
    import torch

    return ref.read_only_tensor().detach().to(torch.int64).contiguous().numpy()


_NUMPY_INTS = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})


def sharing_findings(before: Checkpoint, after: Checkpoint) -> Iterator[str]:
    """Yield one line for each group of tensors that share memory only before, or only after, a chain.

    Parameters that share memory still do so after saving and loading, and an optimizer step then updates all of them.
    If a tensor with several names is replaced under one name only, a loader keeps the value of the last name.
    """
    model, now = before.open_references(), after.open_references()
    old, new = [*model.items(), *_slots(before)], [*now.items(), *_slots(after)]
    # Other groups are the same on both sides. Memory that plugins got may overlap with that of other tensors.
    touched = {id(ref.storage) for _, ref in {*old} ^ {*new}}
    groups = sharing(
        ((is_after, name), ref)
        for is_after, side in enumerate((old, new))
        for name, ref in side
        if id(ref.storage) in touched or ref.storage.given is not None
    )
    place = {key: number for number, group in enumerate(groups) for key, _ in group}
    former = {place[0, name] for name in model if (0, name) in place}
    for number, group in enumerate(groups):
        former_names, names = ([name for (is_after, name), _ in group if is_after == side] for side in (0, 1))
        if len(names) > max(1, len(former_names)):
            yield f"{listed(names, 4)} share memory"
        tied = [name for name in former_names if name in model and name in now]
        # Leave out names that now belong to a renumbered expert, whose tensors existed before under other names.
        left = [name for name in tied if place.get((1, name)) == number or place.get((1, name)) not in former]
        if len({place.get((1, name), name) for name in left}) > 1:
            yield f"{listed(left, 4)} shared memory before and no longer do"


def shared_names(checkpoint: Checkpoint) -> list[tuple[str, ...]]:
    """Return groups of names of model, optimizer or payload tensors that share memory. Opens no expert."""
    payload = ((f"payload.{name}", tensor) for name, tensor in named_references(checkpoint.payload))
    groups = sharing([*checkpoint.open_references().items(), *_slots(checkpoint), *payload])
    return [tuple(name for name, _ in group) for group in groups]


def _slots(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorRef]]:
    return named_references(checkpoint.optimizer.state if checkpoint.optimizer else {})


@dataclass(frozen=True)
class Preservation:
    """Whether the model computes the same function at every ring address.

    Attributes:
        addresses: number of ring addresses.
        changed: number of addresses whose expert has tensors that are not bit-identical to those before.
        max_abs: largest absolute difference of an element. Infinite if leaves or shapes differ or a NaN is new.
        noise: standard deviation of the requested noise, or None if the function may change.
        nonfinite: number of changed addresses whose expert has some weights that are NaN or infinite. Noise does not
            change such weights. They count as equal if they are still NaN, or still the same infinity.
    """

    addresses: int
    changed: int
    max_abs: Number
    noise: float | None = 0.0
    nonfinite: int = 0

    @property
    def as_asked(self) -> bool:
        """Whether the change is at most the requested one: none, within the noise, or any if `noise` is None.

        The bound is 16 σ: Gaussian noise exceeds 8 σ once in 10^15 draws, and rounding to the tensor's dtype at most
        doubles a difference.
        """
        return (
            not self.changed or self.noise is None or (self.max_abs <= 16 * self.noise and math.isfinite(self.max_abs))
        )

    def __str__(self) -> str:
        if not self.changed:
            return f"yes, bit-identical at all {count(self.addresses, 'address')}"
        if self.noise and self.as_asked:
            within = (
                f"within the noise of {self.noise:g}: {self.changed:,} of {count(self.addresses, 'address')}, "
                f"largest difference {self.max_abs:.3g}"
            )
            if not self.nonfinite:
                return within
            return f"finite weights {within}; NaN and infinite weights at {self.nonfinite} of them are as before"
        how = f"largest difference {self.max_abs:.3g}" if math.isfinite(self.max_abs) else "not comparable"
        return f"no: {self.changed:,} of {count(self.addresses, 'address')}, {how}"


def preservation(before: Checkpoint, after: Checkpoint, noise: float | None = 0.0) -> Preservation | None:
    """Compare the experts that own each ring address before and after a chain. The core is not compared.

    An address of a garbage-collected expert counts as unchanged if it keeps its owner.

    Args:
        before: the checkpoint before the chain. Both must satisfy the invariants.
        after: the checkpoint after the chain.
        noise: standard deviation of the requested noise, or None if the function may change.

    Returns:
        None if either side has no ring or no head, or the rings have different lengths.
    """
    was, now = before.router_reference, after.router_reference
    if before.head is None or after.head is None or was is None or now is None:
        return None
    old, new = router_owners(was), router_owners(now)
    if old.shape != new.shape:
        return None
    changed = nonfinite = 0
    max_abs = 0.0
    for (former, owner), number in count_pairs(old, new).items():
        a, b = before.head.experts.get(former), after.head.experts.get(owner)
        if (a is None and b is None and former == owner) or (a is not None and b is not None and _same_expert(a, b)):
            continue
        changed += number
        largest, finite = _largest_difference(a, b)
        max_abs = max(max_abs, largest)
        nonfinite += 0 if finite else number
    return Preservation(len(new), changed, max_abs, noise, nonfinite)


def _same_expert(a: Expert, b: Expert) -> bool:
    if a is b:
        return True
    one, other = a.references(), b.references()
    return one.keys() == other.keys() and all(same_bits(one[leaf], other[leaf]) for leaf in one)


def _largest_difference(a: Expert | None, b: Expert | None) -> tuple[float, bool]:
    """Return the largest absolute difference of two experts, and whether all their elements are finite."""
    if a is None or b is None or a.keys() != b.keys():
        return float("inf"), True
    import torch

    largest, finite = 0.0, True
    olds, news = a.references(), b.references()
    for leaf, old in olds.items():
        new = news[leaf]
        if old.shape != new.shape:
            return float("inf"), True
        wide = torch.complex128 if old.is_complex() else torch.float64
        for x, y in in_pieces(old.read_only_tensor(), new.read_only_tensor()):
            one, other = x.to(wide), y.to(wide)
            same = (one == other) | (one.isnan() & other.isnan())  # inf − inf is NaN
            largest = max(largest, float((one - other).abs().nan_to_num(torch.inf).masked_fill(same, 0).max()))
            finite = finite and bool((one.isfinite() & other.isfinite()).all())
    return largest, finite
