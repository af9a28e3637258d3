"""Rules by which a trainer orders the parameters of its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from vraxion_ckpt.checkpoint.head_names import HeadNames, split_name
from vraxion_ckpt.errors import BindingError

RESULT_ORDER = (
    "give the names of the changed model's optimizer in its order (--result-order FILE: one name a line), or say how "
    "the optimizer was built (--optimizer-order model|sorted|reversed)"
)


class OrderKind(StrEnum):
    """How a trainer orders parameters.

    MODEL: as ``named_parameters()`` lists them.
    SORTED: by name, so that expert 10 comes before expert 2.
    REVERSED: as ``named_parameters()`` lists them, backwards.
    HEAD_FIRST, HEAD_LAST: the head's parameters apart from the others, each part in the model's order.
    LEAF_BY_LEAF: all weights, then all biases; or of the experts alone, or of their layers.
    """

    MODEL = "model"
    SORTED = "sorted"
    REVERSED = "reversed"
    HEAD_FIRST = "head first"
    HEAD_LAST = "head last"
    LEAF_BY_LEAF = "leaf by leaf"


# A rank of a parameter in the model: that of its tensor or of the head, the expert, and the leaf.
Rank = tuple[float, int, int]
_UNKNOWN = float("inf")


@dataclass(frozen=True)
class ModelOrder:
    """The order of a model's parameters.

    Experts are counted upwards, and all have their leaves in the same order, as in a ``ModuleList`` of like modules.

    Attributes:
        body: the rank of every tensor outside the head.
        head: the rank of the head.
        leaves: the rank of each leaf of an expert.
    """

    names: HeadNames
    body: Mapping[str, int]
    head: float
    leaves: Mapping[str, int]

    @classmethod
    def of_list(cls, listed: Sequence[str], names: HeadNames) -> ModelOrder:
        """Return the order that a list of names has itself."""
        in_head = [split_name(name, names) for name in listed]
        head = next((i for i, found in enumerate(in_head) if found), len(listed))
        leaves = dict.fromkeys(found[1] for found in in_head if found)
        body = {name: i for i, (name, found) in enumerate(zip(listed, in_head, strict=True)) if not found}
        return cls(names, body, float(head), {leaf: i for i, leaf in enumerate(leaves)})

    def rank(self, name: str) -> Rank:
        """Return where a parameter stands; the order need not know its expert."""
        found = split_name(name, self.names)
        if found is None:
            return float(self.body.get(name, _UNKNOWN)), 0, 0
        expert, leaf = found
        return (self.head if leaf in self.leaves else _UNKNOWN), expert, self.leaves.get(leaf, 0)


@dataclass(frozen=True)
class Rule:
    """A rule that orders parameters.

    Attributes:
        kind: what it does.
        classes: for `LEAF_BY_LEAF`, which names belong together (see `CLASSES`), and the ranks of these classes.
        orders: for each list of parameters, the model's order as that list itself shows it; if not given, the order
            of the state dict is the model's.
    """

    kind: OrderKind
    classes: tuple[str, Mapping[str, int]] | None = None
    orders: tuple[ModelOrder, ...] | None = field(default=None, compare=False)

    def arranged(self, names: Iterable[str], order: ModelOrder) -> list[str]:
        """Return the names in the order of this rule.

        Args:
            names: in any order.
            order: the model's.

        Raises:
            BindingError: the model's order does not tell where one of them stands.
        """
        names = list(names)
        if self.kind is not OrderKind.SORTED:
            for name in names:
                if order.rank(name)[0] == _UNKNOWN:
                    raise BindingError(
                        "nothing tells where it stands in the model's order", key=name, hint=RESULT_ORDER
                    )
        if self.kind is OrderKind.REVERSED:
            return sorted(names, key=order.rank, reverse=True)
        return sorted(names, key=self._key(order))

    def _key(self, order: ModelOrder) -> Callable[[str], Any]:
        def in_head(name: str) -> bool:
            return split_name(name, order.names) is not None

        if self.kind is OrderKind.SORTED:
            return str
        if self.kind is OrderKind.HEAD_FIRST:
            return lambda name: (not in_head(name), order.rank(name))
        if self.kind is OrderKind.HEAD_LAST:
            return lambda name: (in_head(name), order.rank(name))
        if self.classes is not None:
            which, ranks = self.classes
            class_of = CLASSES[which]
            return lambda name: (ranks.get(class_of(name, order.names), len(ranks)), order.rank(name))
        return order.rank

    def __str__(self) -> str:
        return str(self.kind)


def explains(rule: Rule, names: list[str], order: ModelOrder) -> bool:
    """Tell whether a rule gives the order in which the names stand."""
    try:
        return rule.arranged(names, order) == names
    except BindingError:
        return False


def _last_part(name: str, _: HeadNames) -> str:
    return name.rpartition(".")[2]


def _leaf(name: str, names: HeadNames) -> str:
    found = split_name(name, names)
    return found[1] if found else ""


def _layer(name: str, names: HeadNames) -> str:
    found = split_name(name, names)
    return found[1].partition(".")[0] if found else ""


# What belongs together where parameters are ordered leaf by leaf: of the whole model, what is called alike (all
# weights, then all biases); of the experts, the same leaf, or the same layer, and everything outside the head.
OF_WHOLE_MODEL = "last part"
CLASSES: Mapping[str, Callable[[str, HeadNames], str]] = {OF_WHOLE_MODEL: _last_part, "leaf": _leaf, "layer": _layer}
