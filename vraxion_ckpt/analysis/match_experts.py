"""Match the experts of two checkpoints: bit-identical ones first, the others by id."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.head import Expert, Head
from vraxion_ckpt.checkpoint.tensor_bytes import byte_pieces

_PREFIX = 64  # bytes of each tensor: enough to distinguish most experts without reading all of them


@dataclass(frozen=True)
class Matching:
    """The experts of two heads, by id.

    Attributes:
        same: id before → id after of bit-identical experts. The ids differ if an expert was renumbered.
        changed: ids in both heads whose experts are not matched by content.
        added: ids in the second head only, each with the id of a bit-identical expert of the first, or None.
        removed: ids in the first head only, each with the id of a bit-identical expert of the second, or None.
    """

    same: dict[int, int] = field(default_factory=dict)
    changed: tuple[int, ...] = ()
    added: dict[int, int | None] = field(default_factory=dict)
    removed: dict[int, int | None] = field(default_factory=dict)

    @property
    def pairs(self) -> dict[int, int]:
        """Id before → id after of every expert in both heads."""
        return {**self.same, **{i: i for i in self.changed}}


def match_experts(a: Head | None, b: Head | None) -> Matching:
    """Match the experts of two heads. Opens all experts."""
    first, second = a.experts if a else {}, b.experts if b else {}
    same = {i: i for i, expert in first.items() if i in second and _equal(expert, second[i])}
    left, right = _without(first, same), _without(second, same)
    by_prefix = _group_by_prefix(right)
    for i, expert in left.items():  # renumbered
        j = _twin(expert, right, by_prefix)
        if j is not None:
            same[i] = j
            by_prefix[_prefix(expert)].remove(j)
    left = {i: expert for i, expert in left.items() if i not in same}
    right = _without(right, {j: i for i, j in same.items()})
    changed = tuple(i for i in left if i in right)
    added, removed = (_without(experts, dict.fromkeys(changed, 0)) for experts in (right, left))
    return Matching(dict(sorted(same.items())), changed, _twins(added, first), _twins(removed, second))


def _without(experts: dict[int, Expert], ids: dict[int, int]) -> dict[int, Expert]:
    return {i: expert for i, expert in experts.items() if i not in ids}


def _twins(experts: dict[int, Expert], others: dict[int, Expert]) -> dict[int, int | None]:
    """Return for each expert the id of a bit-identical one among `others`, or None."""
    by_prefix = _group_by_prefix(others) if experts else defaultdict(list)
    return {i: _twin(expert, others, by_prefix) for i, expert in experts.items()}


def _twin(expert: Expert, others: dict[int, Expert], by_prefix: defaultdict[object, list[int]]) -> int | None:
    return next((i for i in by_prefix[_prefix(expert)] if _equal(expert, others[i])), None)


def _equal(a: Expert, b: Expert) -> bool:
    if a is b:
        return True
    one, other = a.references(), b.references()
    return list(one) == list(other) and all(same_bits(one[leaf], other[leaf]) for leaf in one)


def _group_by_prefix(experts: dict[int, Expert]) -> defaultdict[object, list[int]]:
    found: defaultdict[object, list[int]] = defaultdict(list)
    for i, expert in experts.items():
        found[_prefix(expert)].append(i)
    return found


def _prefix(expert: Expert) -> object:
    return tuple(
        (leaf, tensor.dtype, tensor.shape, bytes(next(byte_pieces(tensor), b"")[:_PREFIX]))
        for leaf, tensor in expert.references().items()
    )
