"""Rules by which a trainer orders the parameters of its optimizer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise, starmap
from typing import Any

from vraxion_ckpt.checkpoint.head_names import HeadNames, split_name, split_names
from vraxion_ckpt.errors import BindingError

RESULT_ORDER = (
    "list the parameter names of the changed model in optimizer order (--result-order FILE: one name per line), or "
    "state how the optimizer was built (--optimizer-order model|sorted|reversed)"
)


class OrderKind(StrEnum):
    """How a trainer orders parameters.

    MODEL: in ``named_parameters()`` order, the model's order.
    SORTED: by name as text. Expert 10 comes before expert 2.
    REVERSED: in reversed model's order.
    HEAD_FIRST, HEAD_LAST: the head's parameters before or after all others, both in the model's order.
    LEAF_BY_LEAF: grouped by leaf name, for example all weights, then all biases. See `CLASSES` for the variants.
    """

    MODEL = "model"
    SORTED = "sorted"
    REVERSED = "reversed"
    HEAD_FIRST = "head first"
    HEAD_LAST = "head last"
    LEAF_BY_LEAF = "leaf by leaf"


# Rank of a parameter: rank of its tensor, or of the head if it is in the head; expert id; rank of its leaf.
Rank = tuple[float, int, int]
_UNKNOWN = float("inf")


@dataclass(frozen=True)
class ModelOrder:
    """The order of a model's parameters.

    Experts are ordered by id and have their leaves in the same order, as in a ``ModuleList`` of equal modules.

    Attributes:
        names: the state-dict names that the model family uses for its head.
        body: the rank of every tensor outside the head.
        head: the rank of the head.
        leaves: the rank of each leaf of an expert.
    """

    names: HeadNames
    body: Mapping[str, int]
    head: float
    leaves: Mapping[str, int]
    _ranks: dict[str, Rank] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of_list(cls, listed: Sequence[str], names: HeadNames) -> ModelOrder:
        """Return the model's order, derived from a list of names that are in this order."""
        in_head = [split_name(name, names) for name in listed]
        head = next((i for i, found in enumerate(in_head) if found), len(listed))
        leaves = dict.fromkeys(found[1] for found in in_head if found)
        body = {name: i for i, (name, found) in enumerate(zip(listed, in_head, strict=True)) if not found}
        return cls(names, body, float(head), {leaf: i for i, leaf in enumerate(leaves)})

    def ranks_of(self, names: Iterable[str]) -> list[Rank]:
        """Return the rank of each parameter. It may belong to an expert that the model did not have."""
        names = tuple(names)
        if not self._ranks.keys() >= set(names):
            split = split_names(names, self.names)
            for leaf, experts in split.experts.items():
                head, place = self._of_leaf(leaf)
                self._ranks.update((f"{self.names.experts}{i}.{leaf}", (head, i, place)) for i in experts)
            self._ranks.update((name, self._find_rank(name)) for name in split.others)
        return [*map(self._ranks.__getitem__, names)]

    def _find_rank(self, name: str) -> Rank:
        found = split_name(name, self.names)
        if found is None:
            return float(self.body.get(name, _UNKNOWN)), 0, 0
        head, place = self._of_leaf(found[1])
        return head, found[0], place

    def _of_leaf(self, leaf: str) -> tuple[float, int]:
        return (self.head, self.leaves[leaf]) if leaf in self.leaves else (_UNKNOWN, 0)


@dataclass(frozen=True)
class Rule:
    """A rule that orders parameters.

    Attributes:
        kind: the kind of order.
        classes: for `LEAF_BY_LEAF`, the key in `CLASSES`, and the rank of each class of names. Otherwise None.
        orders: the model's order for each list of parameters, derived from that list. None if the model's order comes
            from the state dict.
    """

    kind: OrderKind
    classes: tuple[str, Mapping[str, int]] | None = None
    orders: tuple[ModelOrder, ...] | None = field(default=None, compare=False)

    def arranged(self, names: Iterable[str], order: ModelOrder) -> list[str]:
        """Return the names in the order of this rule.

        Args:
            names: parameter names in any order.
            order: the model's order.

        Raises:
            BindingError: the rule needs the rank of a name that the model's order does not contain.
        """
        names = list(names)
        if self.kind is not OrderKind.SORTED and (unknown := _without_rank(names, order)):
            raise BindingError("has no known position in the model's order", key=unknown, hint=RESULT_ORDER)
        keys = dict(zip(names, self.keys(names, order), strict=True))
        return sorted(names, key=keys.__getitem__, reverse=self.kind is OrderKind.REVERSED)

    def keys(self, names: Sequence[str], order: ModelOrder) -> Sequence[Any]:
        """Return, for each name, the key by which `arranged` sorts. The model's order must contain the names."""
        if self.kind is OrderKind.SORTED:
            return names
        ranks = order.ranks_of(names)
        if self.kind is OrderKind.HEAD_FIRST:
            return [(rank[0] != order.head, rank) for rank in ranks]
        if self.kind is OrderKind.HEAD_LAST:
            return [(rank[0] == order.head, rank) for rank in ranks]
        if self.classes is not None:
            which, classes = self.classes
            class_of, last = CLASSES[which], len(classes)
            return [(classes.get(class_of(n, order.names), last), r) for n, r in zip(names, ranks, strict=True)]
        return ranks

    def __str__(self) -> str:
        return str(self.kind)


def explains(rule: Rule, names: Sequence[str], order: ModelOrder) -> bool:
    """Return whether names are in the order of a rule."""
    if rule.kind is not OrderKind.SORTED and _without_rank(names, order) is not None:
        return False
    in_order = operator.ge if rule.kind is OrderKind.REVERSED else operator.le
    return all(starmap(in_order, pairwise(rule.keys(names, order))))


def _without_rank(names: Iterable[str], order: ModelOrder) -> str | None:
    """Return the first name that the model's order does not contain, or None."""
    names = list(names)
    ranks = order.ranks_of(names)
    if max(ranks, default=(0.0,))[0] < _UNKNOWN:
        return None
    return next(name for name, rank in zip(names, ranks, strict=True) if rank[0] == _UNKNOWN)


def _last_part(name: str, _: HeadNames) -> str:
    return name.rpartition(".")[2]


def _leaf(name: str, names: HeadNames) -> str:
    found = split_name(name, names)
    return found[1] if found else ""


def _layer(name: str, names: HeadNames) -> str:
    found = split_name(name, names)
    return found[1].partition(".")[0] if found else ""


# Variant of LEAF_BY_LEAF → function that returns the class of a parameter name. Parameters of one class are adjacent.
# "last part" covers the whole model (all weights, then all biases). "leaf" and "layer" divide only the head's
# parameters into classes; the rest of the model is one class.
OF_WHOLE_MODEL = "last part"
CLASSES: Mapping[str, Callable[[str, HeadNames], str]] = {OF_WHOLE_MODEL: _last_part, "leaf": _leaf, "layer": _layer}
