"""Which expert of one checkpoint is which of another: by its bits first, by its id where nothing is bit-identical."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.head import Expert, Head
from vraxion_ckpt.checkpoint.plain_data import bytes_of

_GLANCE = 64  # bytes of a tensor: enough to tell most experts apart without reading them


@dataclass(frozen=True)
class Matching:
    """The experts of two heads, by id.

    Attributes:
        same: bit-identical ones, before → after; the ids differ where an expert was renumbered.
        changed: ids in both heads whose experts are not bit-identical to any that is left.
        added: ids of the second head only, with the id of an expert of the first that is bit-identical, if one is.
        removed: ids of the first head only, with the id of a bit-identical one of the second, if one is.
    """

    same: dict[int, int] = field(default_factory=dict)
    changed: tuple[int, ...] = ()
    added: dict[int, int | None] = field(default_factory=dict)
    removed: dict[int, int | None] = field(default_factory=dict)

    @property
    def pairs(self) -> dict[int, int]:
        """Every expert that is in both, before → after."""
        return {**self.same, **{i: i for i in self.changed}}


def match_experts(a: Head | None, b: Head | None) -> Matching:
    """Match the experts of two heads; opens all."""
    first, second = a.experts if a else {}, b.experts if b else {}
    same = {i: i for i, expert in first.items() if i in second and _equal(expert, second[i])}
    left, right = _without(first, same), _without(second, same)
    lookalikes = _by_glance(right)
    for i, expert in left.items():  # renumbered
        j = _twin(expert, right, lookalikes)
        if j is not None:
            same[i] = j
            lookalikes[_glance(expert)].remove(j)
    left = {i: expert for i, expert in left.items() if i not in same}
    right = _without(right, {j: i for i, j in same.items()})
    changed = tuple(i for i in left if i in right)
    added, removed = (_without(experts, dict.fromkeys(changed, 0)) for experts in (right, left))
    return Matching(dict(sorted(same.items())), changed, _twins(added, first), _twins(removed, second))


def _without(experts: dict[int, Expert], ids: dict[int, int]) -> dict[int, Expert]:
    return {i: expert for i, expert in experts.items() if i not in ids}


def _twins(experts: dict[int, Expert], others: dict[int, Expert]) -> dict[int, int | None]:
    """Return for each expert the id of a bit-identical one among others, if there is one."""
    lookalikes = _by_glance(others) if experts else defaultdict(list)
    return {i: _twin(expert, others, lookalikes) for i, expert in experts.items()}


def _twin(expert: Expert, others: dict[int, Expert], lookalikes: defaultdict[object, list[int]]) -> int | None:
    return next((i for i in lookalikes[_glance(expert)] if _equal(expert, others[i])), None)


def _equal(a: Expert, b: Expert) -> bool:
    return a is b or (list(a) == list(b) and all(same_bits(a[leaf], b[leaf]) for leaf in a))


def _by_glance(experts: dict[int, Expert]) -> defaultdict[object, list[int]]:
    found: defaultdict[object, list[int]] = defaultdict(list)
    for i, expert in experts.items():
        found[_glance(expert)].append(i)
    return found


def _glance(expert: Expert) -> object:
    return tuple((leaf, t.dtype, t.shape, bytes(bytes_of(t)[:_GLANCE].tolist())) for leaf, t in expert.items())
