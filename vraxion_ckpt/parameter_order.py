"""By which rule a trainer orders the parameters of its optimizer, and where those of a changed model go.

torch loads optimizer state by position, so the order in which the trainer will build the optimizer of the changed
model must be known. The order that is found in a checkpoint shows the rule: the model's order, sorted by name,
reversed, the head first or last, leaf by leaf. A rule explains an order if it gives the same order again. The result
is ordered by the same rule. One rule is assumed to hold for all param groups, since groups are made by filtering one
list; only if none explains all of them, those with parameters of the head are looked at alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any

from vraxion_ckpt.errors import BindingError
from vraxion_ckpt.model import Checkpoint, HeadNames, Optimizer, ParamGroup
from vraxion_ckpt.trainers import known_trainer

RESULT_ORDER = (
    "give the names of the changed model's optimizer in its order (--result-order FILE: one name a line), or say how "
    "the optimizer was built (--optimizer-order model|sorted|reversed)"
)
_EXPERT = re.compile(r"([0-9]{1,9})\.(.+)")


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
    def of(cls, checkpoint: Checkpoint) -> ModelOrder:
        """Return the order of a checkpoint's state dict; opens one expert if none is open."""
        head = checkpoint.head
        names = head.names if head else HeadNames()
        leaves: Mapping[str, int] = {}
        if head is not None and head.experts:
            one = next((e for e in head.experts.values() if e.is_open), next(iter(head.experts.values())))
            leaves = {leaf: i for i, leaf in enumerate(one)}
        body = {name: i for i, name in enumerate(checkpoint.core)}
        return cls(names, body, (head.position if head else len(body)) - 0.5, leaves)

    @classmethod
    def of_list(cls, listed: Sequence[str], names: HeadNames) -> ModelOrder:
        """Return the order that a list of names has itself."""
        in_head = [split_name(name, names) for name in listed]
        head = next((i for i, found in enumerate(in_head) if found), len(listed))
        leaves = dict.fromkeys(found[1] for found in in_head if found)
        body = {name: i for i, (name, found) in enumerate(zip(listed, in_head, strict=True)) if not found}
        return cls(names, body, head, {leaf: i for i, leaf in enumerate(leaves)})

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
        classes: for `LEAF_BY_LEAF`, which names belong together (see `_CLASSES`), and the ranks of these classes.
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
            class_of = _CLASSES[which]
            return lambda name: (ranks.get(class_of(name, order.names), len(ranks)), order.rank(name))
        return order.rank

    def __str__(self) -> str:
        return str(self.kind)


_SIMPLE = tuple(Rule(kind) for kind in OrderKind if kind is not OrderKind.LEAF_BY_LEAF)


def split_name(name: str, names: HeadNames) -> tuple[int, str] | None:
    """Return the expert and the leaf of a parameter's name, or None for one outside the head; a single head is 0."""
    if name.startswith(names.single):
        return 0, name.removeprefix(names.single)
    found = _EXPERT.fullmatch(name.removeprefix(names.experts)) if name.startswith(names.experts) else None
    return (int(found[1]), found[2]) if found else None


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
_CLASSES: Mapping[str, Callable[[str, HeadNames], str]] = {"last part": _last_part, "leaf": _leaf, "layer": _layer}


# --- what explains an order ---


def explain(optimizer: Optimizer, checkpoint: Checkpoint) -> tuple[Rule, ...]:
    """Return every rule that explains the order in which an optimizer lists its parameters; empty if none does.

    Args:
        optimizer: bound to names.
        checkpoint: tells the model's order as far as its state dict does.
    """
    lists = lists_of(optimizer, checkpoint)
    if lists is None:
        return ()
    order, is_certain = model_order(checkpoint)
    if order is not None and known_trainer(checkpoint) is not None:
        rule = Rule(OrderKind.MODEL)
        if all(explains(rule, listed, order) for listed in lists):
            return (rule,)
    rules = _rules_for(lists, [order] * len(lists)) if order is not None else ()
    if rules or is_certain:
        return rules
    names = checkpoint.head.names if checkpoint.head else HeadNames()
    found: list[Rule] = []
    for kind, turned in ((OrderKind.MODEL, lists), (OrderKind.REVERSED, [listed[::-1] for listed in lists])):
        if all(_may_be_a_models(listed, names) for listed in turned):
            found.append(Rule(kind, orders=tuple(ModelOrder.of_list(listed, names) for listed in turned)))
    if all(listed == sorted(listed) for listed in lists):
        found.append(Rule(OrderKind.SORTED))
    return tuple(found)


def _rules_for(lists: Sequence[list[str]], orders: Sequence[ModelOrder]) -> tuple[Rule, ...]:
    """Return the rules that explain all lists, else those that explain all lists with parameters of the head."""
    pairs = list(zip(lists, orders, strict=True))
    of_head = [(names, order) for names, order in pairs if any(split_name(name, order.names) for name in names)]
    for those in (pairs, of_head):
        simple = tuple(rule for rule in _SIMPLE if all(explains(rule, *pair) for pair in those))
        if simple and those:
            return simple
        # An order that a simple rule explains, too, shows nothing about leaves.
        by_leaf = tuple(rule for rule in _leaf_rules(those) if all(explains(rule, *pair) for pair in those))
        if by_leaf and those:
            return by_leaf
    return ()


def _leaf_rules(pairs: Sequence[tuple[list[str], ModelOrder]]) -> Iterable[Rule]:
    for which, class_of in _CLASSES.items():
        classes = dict.fromkeys(class_of(name, order.names) for names, order in pairs for name in names)
        yield Rule(OrderKind.LEAF_BY_LEAF, (which, {each: i for i, each in enumerate(classes)}))


def explains(rule: Rule, names: list[str], order: ModelOrder) -> bool:
    """Tell whether a rule gives the order in which the names stand."""
    try:
        return rule.arranged(names, order) == names
    except BindingError:
        return False


def model_order(checkpoint: Checkpoint) -> tuple[ModelOrder | None, bool]:
    """Return the order of a model's parameters as far as its state dict tells, and whether that is certain.

    It is certain where the state dict is an ordered one of ``Module.state_dict()``, whose ``_metadata`` lists the
    modules in the same order, and where a trainer that is known has written it. Names that merely stand sorted, as
    after safetensors, tell nothing. In between, for instance in a plain dict, the order is only probable.
    """
    names = [*checkpoint.core]
    head = checkpoint.head
    if head is not None:
        names[head.position : head.position] = list(_names_of_head(checkpoint))
    stand_sorted = len(names) > 1 and names == sorted(names)
    metadata = checkpoint.metadata
    if metadata and _is_in_order_of(metadata, checkpoint):
        alone = len({name.rpartition(".")[0] for name in names}) == len(names)
        if not stand_sorted or alone:
            return ModelOrder.of(checkpoint), True
    if stand_sorted:
        return None, False
    return ModelOrder.of(checkpoint), known_trainer(checkpoint) is not None


def _names_of_head(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield the names of the head in state-dict order, of experts that are not open one name each."""
    head = checkpoint.head
    for i, expert in head.experts.items() if head else ():
        assert head is not None
        yield from (head.prefix(i) + leaf for leaf in (expert if expert.is_open else ("",)))


def _is_in_order_of(metadata: Mapping[str, Any], checkpoint: Checkpoint) -> bool:
    """Tell whether the tensors outside the head, and the head, stand in the order in which modules are listed."""
    places = {module: place for place, module in enumerate(metadata)}
    names = list(checkpoint.core)
    if checkpoint.head is not None:
        container = checkpoint.head.prefix(0) if checkpoint.head.experts else checkpoint.head.names.experts
        names.insert(checkpoint.head.position, container.partition(".")[0] + ".")
    modules = [name.rpartition(".")[0] for name in names]
    if not all(module in places for module in modules):
        return False
    return all(places[a] <= places[b] for a, b in pairwise(modules))


def _may_be_a_models(listed: Sequence[str], names: HeadNames) -> bool:
    """Tell whether a list of names can be the order of ``named_parameters()``.

    There, the parameters of a module stand together, its own before those of the modules in it; modules with a number
    are counted upwards; all experts have their leaves in one order; torch's own modules have a weight before a bias.
    """
    seen: set[str] = set()
    path: list[str] = []
    last: dict[str, int] = {}
    for name in listed:
        *modules, leaf = name.split(".")
        common = 0
        while common < min(len(path), len(modules)) and path[common] == modules[common]:
            common += 1
        for depth in range(common, len(modules)):
            below, module = ".".join(modules[:depth]), ".".join(modules[: depth + 1])
            if module in seen:
                return False
            seen.add(module)
            if modules[depth].isdecimal():
                if int(modules[depth]) <= last.get(below, -1):
                    return False
                last[below] = int(modules[depth])
        own = ".".join(modules)
        if (len(path) > len(modules) and common == len(modules)) or (leaf == "weight" and f"{own}.bias" in seen):
            return False
        seen.add(f"{own}.{leaf}")
        path = modules
    leaves: dict[int, list[str]] = {}
    for name in listed:
        if found := split_name(name, names):
            leaves.setdefault(found[0], []).append(found[1])
    order = ModelOrder.of_list(listed, names).leaves
    return all(inner == sorted(inner, key=order.__getitem__) for inner in leaves.values())


# --- lists: the groups, or what several groups of one parameter list together ---


def owns_groups(optimizer: Optimizer, checkpoint: Checkpoint) -> bool:
    """Tell whether a new expert gets param groups of its own, because every expert has its own.

    That is so if every parameter of the head stands alone in its group, or if there are several experts and no
    group that holds one's parameters holds anything else.
    """
    names = checkpoint.head.names if checkpoint.head else HeadNames()
    of_head = [group.params for group in optimizer.groups if any(split_name(name, names) for name in group.params)]
    if not of_head:
        return False
    owners = [{found[0] if (found := split_name(name, names)) else None for name in params} for params in of_head]
    return all(len(params) == 1 for params in of_head) or (
        all(len(each) == 1 and None not in each for each in owners) and len(set().union(*owners)) > 1
    )


def lists_of(optimizer: Optimizer, checkpoint: Checkpoint) -> list[list[str]] | None:
    """Return the lists of parameters that a rule orders: each group's, or of a run of small groups all together.

    Where experts have groups of their own, these and the groups of one parameter around them are one list. None if
    such groups do not stand together.
    """
    run = run_of_groups(optimizer, checkpoint)
    if run is None:
        return None
    groups = [group.params for group in optimizer.groups]
    start, end = run
    together = [name for params in groups[start:end] for name in params]
    return [list(params) for params in [*groups[:start], *([together] if end > start else []), *groups[end:]]]


def run_of_groups(optimizer: Optimizer, checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Return where the groups that make one list begin and end; None if they do not stand together."""
    if not owns_groups(optimizer, checkpoint):
        return 0, 0
    names = checkpoint.head.names if checkpoint.head else HeadNames()

    def is_of_head(group: ParamGroup) -> bool:
        return any(split_name(name, names) for name in group.params)

    places = [i for i, group in enumerate(optimizer.groups) if is_of_head(group)]
    start, end = places[0], places[-1] + 1
    if any(len(group.params) != 1 and not is_of_head(group) for group in optimizer.groups[start:end]):
        return None
    while start and len(optimizer.groups[start - 1].params) == 1:
        start -= 1
    while end < len(optimizer.groups) and len(optimizer.groups[end].params) == 1:
        end += 1
    return start, end
