"""By which rule a trainer orders the parameters of its optimizer, and where those of a changed model go.

torch loads optimizer state by position, so the order in which the trainer will build the optimizer of the changed
model must be known. The order that is found in a checkpoint shows the rule: the model's order, sorted by name,
reversed, the head first or last, leaf by leaf. A rule explains an order if it gives the same order again. The result
is ordered by the same rule. One rule must explain all param groups, since groups are made by filtering one list: an
order of one group that nothing explains says that the trainer does something unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from vraxion_ckpt.checkpoint.head_names import VRAXION, HeadNames, split_name
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, ParamGroup
from vraxion_ckpt.checkpoint.order_rules import CLASSES, OF_WHOLE_MODEL, ModelOrder, OrderKind, Rule, explains
from vraxion_ckpt.optimizer.trainers import known_trainer

_SIMPLE = tuple(Rule(kind) for kind in OrderKind if kind is not OrderKind.LEAF_BY_LEAF)


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
    names = checkpoint.head.names if checkpoint.head else VRAXION
    found: list[Rule] = []
    for kind, turned in ((OrderKind.MODEL, lists), (OrderKind.REVERSED, [listed[::-1] for listed in lists])):
        if all(_may_be_a_models(listed, names) for listed in turned):
            found.append(Rule(kind, orders=tuple(ModelOrder.of_list(listed, names) for listed in turned)))
    if all(listed == sorted(listed) for listed in lists):
        found.append(Rule(OrderKind.SORTED))
    return tuple(found)


def _rules_for(lists: Sequence[list[str]], orders: Sequence[ModelOrder]) -> tuple[Rule, ...]:
    """Return the rules that explain all lists."""
    pairs = list(zip(lists, orders, strict=True))
    simple = tuple(rule for rule in _SIMPLE if all(explains(rule, *pair) for pair in pairs))
    by_leaf = tuple(rule for rule in _leaf_rules(pairs) if all(explains(rule, *pair) for pair in pairs))
    if not simple:
        return by_leaf
    if Rule(OrderKind.MODEL) not in simple:
        return simple + by_leaf
    # Leaf by leaf over the whole model is taken into account if leaves of several modules stand together; layers with
    # several leaves then tell the two apart. Leaf by leaf within the head alone cannot show in the model's order as
    # long as there is one expert: it is taken for the model's order then.
    together = any(len(listed) > len({name.rpartition(".")[2] for name in listed}) for listed in lists)
    return simple + tuple(r for r in by_leaf if together and r.classes is not None and r.classes[0] == OF_WHOLE_MODEL)


def _leaf_rules(pairs: Sequence[tuple[list[str], ModelOrder]]) -> Iterable[Rule]:
    for which, class_of in CLASSES.items():
        classes = dict.fromkeys(class_of(name, order.names) for names, order in pairs for name in names)
        yield Rule(OrderKind.LEAF_BY_LEAF, (which, {each: i for i, each in enumerate(classes)}))


def order_of(checkpoint: Checkpoint) -> ModelOrder:
    """Return the order of a checkpoint's state dict; opens one expert if none is open."""
    head = checkpoint.head
    names = head.names if head else VRAXION
    leaves: Mapping[str, int] = {}
    if head is not None and head.experts:
        one = next((e for e in head.experts.values() if e.is_open), next(iter(head.experts.values())))
        leaves = {leaf: i for i, leaf in enumerate(one)}
    body = {name: i for i, name in enumerate(checkpoint.core)}
    return ModelOrder(names, body, (head.position if head else len(body)) - 0.5, leaves)


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
    stand_sorted = _stand_sorted(names, checkpoint.open_tensors())
    metadata = checkpoint.metadata
    if metadata and _is_in_order_of(metadata, checkpoint):
        alone = len({name.rpartition(".")[0] for name in names}) == len(names)
        if not stand_sorted or alone:
            return order_of(checkpoint), True
    if stand_sorted:
        return None, False
    return order_of(checkpoint), known_trainer(checkpoint) is not None


def _stand_sorted(names: Sequence[str], tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether names are sorted, at least among the tensors of each dtype: safetensors sorts by dtype first."""
    by_dtype: dict[Any, list[str]] = {}
    for name in names:
        tensor = tensors.get(name)
        by_dtype.setdefault(tensor.dtype if tensor is not None else None, []).append(name)
    several = [listed for listed in by_dtype.values() if len(listed) > 1]
    return bool(several) and all(listed == sorted(listed) for listed in several)


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

    That is so if every parameter has a group of its own, or if there are several experts and no group that holds one's
    parameters holds anything else. One expert whose parameters stand alone, beside larger groups, proves nothing: its
    groups may be those of the head's weights and of its biases.
    """
    names = checkpoint.head.names if checkpoint.head else VRAXION
    of_head = [group.params for group in optimizer.groups if any(split_name(name, names) for name in group.params)]
    if not of_head:
        return False
    owners = [{found[0] if (found := split_name(name, names)) else None for name in params} for params in of_head]
    sizes = [len(group.params) for group in optimizer.groups if group.params]
    alone = len(sizes) > 1 and set(sizes) == {1}
    return alone or (all(len(each) == 1 and None not in each for each in owners) and len(set().union(*owners)) > 1)


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
    names = checkpoint.head.names if checkpoint.head else VRAXION

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
