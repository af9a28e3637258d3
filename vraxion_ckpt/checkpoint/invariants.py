"""What must be true of a checkpoint, and what a chain must leave as it was.

`findings` judges one checkpoint; `sharing_findings` and `preservation` compare before and after. All of them only
look: who calls decides which error to raise. Experts that were not opened are not opened here, and an expert
that is the same object before and after is known to be untouched.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.model import Checkpoint, Expert, Head, HeadKind
from vraxion_ckpt.checkpoint.plain_data import named_tensors
from vraxion_ckpt.checkpoint.ring import Ints
from vraxion_ckpt.checkpoint.torch_optimizer import known_shapes, shape_conflicts
from vraxion_ckpt.support.json_models import Number

_PIECE = 2**20


def findings(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield one line for each thing that must be true of a checkpoint and is not."""
    if checkpoint.head is not None:
        yield from _head_findings(checkpoint.head)
        yield from _expert_findings(checkpoint.head)
        if checkpoint.lifecycle and set(checkpoint.lifecycle) != set(range(checkpoint.num_experts)):
            yield (
                f"lifecycle rows are for experts {_brief(sorted(checkpoint.lifecycle))}, "
                f"the head has {checkpoint.num_experts}"
            )
    yield from _router_findings(checkpoint)
    yield from _optimizer_findings(checkpoint)


def _head_findings(head: Head) -> Iterator[str]:
    ids = [*head.experts, *head.deleted]
    present = set(ids)
    if len(ids) != len(set(ids)):
        yield f"experts {_brief(sorted(set(head.experts) & head.deleted))} are both live and deleted"
    elif present != set(range(len(ids))):
        missing = next(i for i in range(len(ids)) if i not in present)
        yield f"expert ids have a hole: there is no expert {missing}, and it is not listed as deleted"
    if not head.experts:
        yield "the head has no expert"
    if head.kind is HeadKind.SINGLE and ids != [0]:
        yield f"a single head has exactly expert 0, not {_brief(ids)}"
    if len(set(map(id, head.experts.values()))) != len(head.experts):
        yield "two experts are one object and would share their storage"


def _expert_findings(head: Head) -> Iterator[str]:
    """Compare the experts that are open with each other: a loader skips one that does not fit, without a word."""
    opened = [(i, expert) for i, expert in head.experts.items() if expert.is_open]
    if not opened:
        return
    first, model = opened[0]
    for i, expert in opened[1:]:
        if set(expert) != set(model):
            odd = sorted(set(expert) ^ set(model))
            yield f"expert {i} has other tensors than expert {first}: {_brief(odd)}"
            continue
        for leaf, tensor in expert.items():
            # Hidden widths differ between experts with inner layers; plain linear experts are all alike.
            alike = tensor.shape == model[leaf].shape if "." not in leaf else tensor.ndim == model[leaf].ndim
            if not alike or tensor.dtype != model[leaf].dtype:
                yield (f"expert {i}: {leaf} is {_tensor(tensor)}, that of expert {first} is {_tensor(model[leaf])}")


def _router_findings(checkpoint: Checkpoint) -> Iterator[str]:
    router = checkpoint.router_map
    if router is None or checkpoint.head is None:
        return
    if router.is_floating_point() or router.is_complex() or router.dtype == torch.bool:
        yield f"router_map must hold whole numbers, not {router.dtype}"
    elif router.ndim != 1 or not router.numel():
        yield f"router_map must be a non-empty list of owners, not of shape {list(router.shape)}"
    else:
        owners = router_owners(router)
        wrong = np.flatnonzero((owners < 0) | (owners >= checkpoint.num_experts))
        if len(wrong):
            yield (
                f"router_map gives address {wrong[0]} to expert {owners[wrong[0]]}, but the number of experts is "
                f"{checkpoint.num_experts} (addresses with this fault: {len(wrong)})"
            )


def _optimizer_findings(checkpoint: Checkpoint) -> Iterator[str]:
    optimizer, head = checkpoint.optimizer, checkpoint.head
    if optimizer is None:
        return
    params = optimizer.params
    if len(set(params)) != len(params):
        yield f"the optimizer lists {Counter(params).most_common(1)[0][0]} twice"
    for name in optimizer.state.keys() - set(params):
        yield f"the optimizer has state for {name}, which is in no param group"
    tensors = checkpoint.open_tensors()
    for name in params:
        if name not in tensors and not (head and head.is_not_at_hand(name)):
            yield f"the optimizer lists {name}, which the model does not have"
    for conflict in shape_conflicts(optimizer, known_shapes(checkpoint)):
        yield f"{conflict.name}: {conflict.what}"


def router_owners(router: Tensor) -> Ints:
    """Return a router map as int64 numpy, shape ``[L]``."""
    return router.detach().to(torch.int64).contiguous().numpy()


def sharing_findings(before: Checkpoint, after: Checkpoint) -> Iterator[str]:
    """Yield tensors that share a storage after a chain and did not before, and those that were tied and are no more.

    Two parameters on one storage survive saving and loading, and the first optimizer step then updates both. Of a
    tied tensor that was replaced under one name only, a loader takes whichever name comes last.
    """
    known = {place: len(names) for place, names in _storages(before).items()}
    for place, names in _storages(after).items():
        if len(names) > max(1, known.get(place, 0)):
            yield f"{_brief(names)} share one storage"
    now = after.open_tensors()
    former = {tensor.data_ptr() for tensor in before.open_tensors().values()}
    for place, names in _ties(before):
        # Under a name of the tie there may now be another expert, renumbered; what was put there anew is the danger.
        left = [n for n in names if n in now and (now[n].data_ptr() == place or now[n].data_ptr() not in former)]
        if len({now[name].data_ptr() for name in left}) > 1:
            yield f"{_brief(left)} were one tensor and are no longer"


def shared_memory(checkpoint: Checkpoint) -> list[tuple[str, ...]]:
    """List the names of each tensor of model, optimizer or payload that has more than one name; opens no expert."""
    slots = checkpoint.optimizer.state if checkpoint.optimizer else {}
    named = [
        *checkpoint.open_tensors().items(),
        *((f"{name}.{slot}", value) for name, entries in slots.items() for slot, value in entries.items()),
        *((f"payload.{name}", tensor) for name, tensor in named_tensors(checkpoint.payload)),
    ]
    places: dict[tuple[int, int], list[str]] = {}
    for name, value in named:
        if isinstance(value, Tensor) and value.numel():
            places.setdefault((value.data_ptr(), value.numel() * value.itemsize), []).append(name)
    return [tuple(names) for names in places.values() if len(names) > 1]


def _ties(checkpoint: Checkpoint) -> list[tuple[int, list[str]]]:
    """List the address and the names of each model tensor that has more than one name."""
    places: dict[tuple[int, int], list[str]] = {}
    for name, tensor in checkpoint.open_tensors().items():
        if tensor.numel():
            places.setdefault((tensor.data_ptr(), tensor.numel()), []).append(name)
    return [(address, names) for (address, _), names in places.items() if len(names) > 1]


def _storages(checkpoint: Checkpoint) -> dict[int, list[str]]:
    """Name everything that lives on each non-empty storage: model tensors and optimizer slots."""
    places: dict[int, list[str]] = {}

    def note(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.untyped_storage().nbytes():
            places.setdefault(value.untyped_storage().data_ptr(), []).append(name)
        elif isinstance(value, list | tuple):
            for item in value:
                note(name, item)

    for name, tensor in checkpoint.open_tensors().items():
        note(name, tensor)
    if checkpoint.optimizer is not None:
        for name, slots in checkpoint.optimizer.state.items():
            for slot, value in slots.items():
                note(f"{slot} of {name}", value)
    return places


@dataclass(frozen=True)
class Preservation:
    """Whether the model computes the same function at every ring address.

    Attributes:
        addresses: how many addresses the ring has.
        changed: how many of them are routed to tensors that are not bit-identical to those before.
        max_abs: the largest absolute difference of an entry; infinite where shapes differ, or with a NaN.
        noise: the standard deviation of the noise that was asked for, or None if the function was to change.
        nonfinite: how many of the changed addresses are routed to weights that are NaN or infinite in part. Noise
            does not change those; they count as equal if they are still NaN, or the same infinity.
    """

    addresses: int
    changed: int
    max_abs: Number
    noise: float | None = 0.0
    nonfinite: int = 0

    @property
    def as_asked(self) -> bool:
        """Whether this is no more than was asked for: identical, or within noise.

        Of Gaussian noise nothing is seen beyond 8 σ (1 in 10^15); rounding to the tensor's own grid at most doubles it.
        """
        return (
            not self.changed or self.noise is None or (self.max_abs <= 16 * self.noise and math.isfinite(self.max_abs))
        )

    def __str__(self) -> str:
        if not self.changed:
            return f"yes, bit-identical at all {self.addresses} addresses"
        if self.noise and self.as_asked:
            within = (
                f"within the noise of {self.noise:g}: {self.changed} of {self.addresses} addresses, "
                f"largest difference {self.max_abs:.3g}"
            )
            if not self.nonfinite:
                return within
            return f"finite weights {within}; at {self.nonfinite} of them, some weights are NaN or infinite as before"
        how = f"largest difference {self.max_abs:.3g}" if math.isfinite(self.max_abs) else "which cannot be compared"
        return f"no: {self.changed} of {self.addresses} addresses, {how}"


def preservation(before: Checkpoint, after: Checkpoint, noise: float | None = 0.0) -> Preservation | None:
    """Compare, for every ring address, the expert it was routed to with the one it is routed to now.

    Only the head is compared; None where either side has no ring or no head. An address whose expert's tensors
    were garbage-collected counts as unchanged if it keeps its owner.
    """
    if before.head is None or after.head is None or before.router_map is None or after.router_map is None:
        return None
    old, new = router_owners(before.router_map), router_owners(after.router_map)
    if old.shape != new.shape:
        return None
    pairs, counts = np.unique(np.stack([old, new]), axis=1, return_counts=True)
    changed = nonfinite = 0
    max_abs = 0.0
    for (was, now), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
        a, b = before.head.experts.get(was), after.head.experts.get(now)
        if (a is None and b is None and was == now) or (a is not None and b is not None and _same_expert(a, b)):
            continue
        changed += count
        largest, finite = _largest_difference(a, b)
        max_abs = max(max_abs, largest)
        nonfinite += 0 if finite else count
    return Preservation(len(new), changed, max_abs, noise, nonfinite)


def _same_expert(a: Expert, b: Expert) -> bool:
    return a is b or (a.keys() == b.keys() and all(same_bits(a[leaf], b[leaf]) for leaf in a))


def _largest_difference(a: Expert | None, b: Expert | None) -> tuple[float, bool]:
    """Return the largest absolute difference of two experts, and whether all elements of both are finite."""
    if a is None or b is None or a.keys() != b.keys():
        return float("inf"), True
    largest, finite = 0.0, True
    for leaf in a:
        if a[leaf].shape != b[leaf].shape:
            return float("inf"), True
        wide = torch.complex128 if a[leaf].is_complex() else torch.float64
        # A piece at a time: the difference of two large experts must not double the memory.
        x, y = a[leaf].detach().reshape(-1), b[leaf].detach().reshape(-1)
        for start in range(0, len(x), _PIECE):
            piece = slice(start, start + _PIECE)
            one, other = x[piece].to(wide), y[piece].to(wide)
            same = (one == other) | (one.isnan() & other.isnan())  # an infinity less itself is not a number
            largest = max(largest, float((one - other).abs().nan_to_num(torch.inf).masked_fill(same, 0).max()))
            finite = finite and bool((one.isfinite() & other.isfinite()).all())
    return largest, finite


def _tensor(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")


def _brief(items: list[Any], most: int = 4) -> str:
    shown = ", ".join(map(str, items[:most]))
    return shown if len(items) <= most else f"{shown}, … ({len(items)} in all)"
