"""Find the rule by which a trainer orders the parameters of its optimizer.

torch loads optimizer state by position, so the order in which the trainer will build the optimizer of the changed
model must be known. It is derived from the order in the checkpoint. The known rules are: the model's order, sorted by
name, reversed, head first or last, leaf by leaf. A rule explains an order if it reproduces the order. The result is
ordered by the same rule. One rule must explain all param groups, because trainers build groups by filtering one list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from vraxion_ckpt.checkpoint.head_names import RING_HEAD, HeadNames, split_name
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, ParamGroup, is_only_usual
from vraxion_ckpt.checkpoint.order_rules import CLASSES, OF_WHOLE_MODEL, ModelOrder, OrderKind, Rule, explains
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.optimizer.trainers import known_trainer

_SIMPLE = tuple(Rule(kind) for kind in OrderKind if kind is not OrderKind.LEAF_BY_LEAF)


# --- rules that explain an order ---


def explain(optimizer: Optimizer, checkpoint: Checkpoint) -> tuple[Rule, ...]:
    """Return all rules that explain the order of an optimizer's parameters.

    Args:
        optimizer: the optimizer, or one part, bound to names.
        checkpoint: the checkpoint of the optimizer. If possible, the model's order is taken from its state dict.
    """
    lists = lists_of(optimizer, checkpoint)
    if lists is None:
        return ()
    order, is_certain = model_order(checkpoint)
    is_usual = checkpoint.optimizer is not None and is_only_usual(checkpoint.optimizer.parts)
    if order is not None and is_usual and known_trainer(checkpoint) is not None:
        rule = Rule(OrderKind.MODEL)
        if all(explains(rule, listed, order) for listed in lists):
            return (rule,)
    rules = _rules_for(lists, [order] * len(lists)) if order is not None else ()
    if rules or is_certain:
        return rules
    names = checkpoint.head.names if checkpoint.head else RING_HEAD
    found: list[Rule] = []
    for kind, turned in ((OrderKind.MODEL, lists), (OrderKind.REVERSED, [listed[::-1] for listed in lists])):
        if all(_can_be_model_order(listed, names) for listed in turned):
            found.append(Rule(kind, orders=tuple(ModelOrder.of_list(listed, names) for listed in turned)))
    if all(listed == sorted(listed) for listed in lists):
        found.append(Rule(OrderKind.SORTED))
    return tuple(found)


def _rules_for(lists: Sequence[list[str]], orders: Sequence[ModelOrder]) -> tuple[Rule, ...]:
    """Return the rules that explain all lists."""
    pairs = list(zip(lists, orders, strict=True))
    simple = tuple(rule for rule in _SIMPLE if all(explains(rule, *pair) for pair in pairs))
    variants = list(CLASSES)
    if Rule(OrderKind.MODEL) in simple:
        # Leaf by leaf over the whole model is still possible if a leaf name occurs twice in a list. Leaf by leaf within
        # the head equals the model's order while there is one expert; then assume the model's order.
        together = any(len(listed) > len({name.rpartition(".")[2] for name in listed}) for listed in lists)
        variants = [OF_WHOLE_MODEL] if together else []
    by_leaf = _leaf_rules(variants, pairs)
    return simple + tuple(rule for rule in by_leaf if all(explains(rule, *pair) for pair in pairs))


def _leaf_rules(variants: Iterable[str], pairs: Sequence[tuple[list[str], ModelOrder]]) -> Iterable[Rule]:
    for which in variants:
        class_of = CLASSES[which]
        classes = dict.fromkeys(class_of(name, order.names) for names, order in pairs for name in names)
        yield Rule(OrderKind.LEAF_BY_LEAF, (which, {each: i for i, each in enumerate(classes)}))


def order_of(checkpoint: Checkpoint) -> ModelOrder:
    """Return the order of a checkpoint's state dict. Opens one expert if none is open."""
    head = checkpoint.head
    names = head.names if head else RING_HEAD
    leaves: Mapping[str, int] = {}
    if head is not None and head.experts:
        one = next((e for e in head.experts.values() if e.is_open), next(iter(head.experts.values())))
        leaves = {leaf: i for i, leaf in enumerate(one)}
    body = {name: i for i, name in enumerate(checkpoint.core)}
    return ModelOrder(names, body, (head.position if head else len(body)) - 0.5, leaves)


def model_order(checkpoint: Checkpoint) -> tuple[ModelOrder | None, bool]:
    """Return the order of a model's parameters as its state dict shows it, and whether it is certain.

    The order is certain if the state dict has a ``_metadata`` that lists the modules in the same order, as
    ``Module.state_dict()`` does, or if a recognised trainer wrote it. It is probable for other dicts. It is unknown
    (None) if the names are sorted, because safetensors sorts names.
    """
    names = [*checkpoint.core]
    head = checkpoint.head
    if head is not None:
        names[head.position : head.position] = list(_names_of_head(checkpoint))
    is_sorted = _is_sorted(names, checkpoint.open_references())
    metadata = checkpoint.metadata
    if metadata and _is_in_order_of(metadata, checkpoint):
        alone = len({name.rpartition(".")[0] for name in names}) == len(names)
        if not is_sorted or alone:
            return order_of(checkpoint), True
    if is_sorted:
        return None, False
    return order_of(checkpoint), known_trainer(checkpoint) is not None


def _is_sorted(names: Sequence[str], tensors: Mapping[str, TensorRef]) -> bool:
    """Return whether names are sorted within each dtype. This is how safetensors sorts: by dtype, then by name."""
    by_dtype: dict[Any, list[str]] = {}
    for name in names:
        tensor = tensors.get(name)
        by_dtype.setdefault(tensor.dtype if tensor is not None else None, []).append(name)
    several = [listed for listed in by_dtype.values() if len(listed) > 1]
    return bool(several) and all(listed == sorted(listed) for listed in several)


def _names_of_head(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield the names of the head's tensors in state-dict order. For a closed expert, yield only its prefix."""
    head = checkpoint.head
    for i, expert in head.experts.items() if head else ():
        assert head is not None
        prefix = head.prefix(i)
        yield from (prefix + leaf for leaf in expert) if expert.is_open else (prefix,)


def _is_in_order_of(metadata: Mapping[str, Any], checkpoint: Checkpoint) -> bool:
    """Return whether the tensors outside the head, and the head, are in the order of the modules in `metadata`."""
    places = {module: place for place, module in enumerate(metadata)}
    names = list(checkpoint.core)
    if checkpoint.head is not None:
        container = checkpoint.head.prefix(0) if checkpoint.head.experts else checkpoint.head.names.experts
        names.insert(checkpoint.head.position, container.partition(".")[0] + ".")
    modules = [name.rpartition(".")[0] for name in names]
    if not all(module in places for module in modules):
        return False
    return all(places[a] <= places[b] for a, b in pairwise(modules))


def _can_be_model_order(listed: Sequence[str], names: HeadNames) -> bool:
    """Return whether a list of names can be in ``named_parameters()`` order.

    In this order, the parameters of a module are adjacent, its own before those of its submodules. Numbered modules
    are in ascending order. All experts have their leaves in the same order. A weight comes before its bias.
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


# --- lists of parameters that a rule orders: param groups, or several small groups joined ---


def owns_groups(optimizer: Optimizer, checkpoint: Checkpoint) -> bool:
    """Return whether every expert has its own param groups. A new expert then also gets its own.

    This holds if every parameter has its own group, or if there are several experts and every group with parameters of
    an expert has only parameters of this expert. The groups of a model with one expert prove nothing, because one may
    be for the head's weights and another for its biases.
    """
    names = checkpoint.head.names if checkpoint.head else RING_HEAD
    of_head = [group.params for group in optimizer.groups if any(split_name(name, names) for name in group.params)]
    if not of_head:
        return False
    sizes = [len(group.params) for group in optimizer.groups if group.params]
    if len(sizes) > 1 and set(sizes) == {1}:
        return True
    owners = {_only_owner(params, names) for params in of_head}
    return None not in owners and len(owners) > 1


def _only_owner(params: Sequence[str], names: HeadNames) -> int | None:
    """Return the id of the expert to which all parameters belong, or None if there is none."""
    first = split_name(params[0], names)
    if first is None:
        return None
    others = (split_name(name, names) for name in params)
    return first[0] if all(other is not None and other[0] == first[0] for other in others) else None


def lists_of(optimizer: Optimizer, checkpoint: Checkpoint) -> list[list[str]] | None:
    """Return the lists of parameters that a rule orders, one for each param group.

    If experts have their own groups, these groups and adjacent groups of one parameter are joined to one list.

    Returns:
        None if groups of several other parameters lie between the groups of the experts.
    """
    run = run_of_groups(optimizer, checkpoint)
    if run is None:
        return None
    groups = [group.params for group in optimizer.groups]
    start, end = run
    together = [name for params in groups[start:end] for name in params]
    return [list(params) for params in [*groups[:start], *([together] if end > start else []), *groups[end:]]]


def has_unclear_groups(optimizer: Optimizer, checkpoint: Checkpoint) -> bool:
    """Return whether it is unknown if a new expert gets param groups of its own.

    This is so if the optimizer has only parameters of one expert, each in its own group: there may be a group for each
    parameter, or one for weights and one for biases.
    """
    names = checkpoint.head.names if checkpoint.head else RING_HEAD
    params = optimizer.params
    return len(params) > 1 and owns_groups(optimizer, checkpoint) and _only_owner(params, names) is not None


def insert_groups(optimizer: Optimizer, new: Sequence[ParamGroup], checkpoint: Checkpoint) -> None:
    """Insert param groups of new experts after those of the other experts of the same part.

    Args:
        optimizer: the optimizer, which is changed.
        new: the groups to insert.
        checkpoint: the checkpoint of the optimizer.
    """
    for number, one in enumerate(optimizer.each_part()):
        own = [group for group in new if group.part == number]
        run = run_of_groups(one, checkpoint) if own else None
        ahead = sum(group.part < number for group in optimizer.groups)
        at = ahead + (run[1] if run else len(one.groups))
        optimizer.groups[at:at] = own


def run_of_groups(optimizer: Optimizer, checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Return start and end of the groups that `lists_of` joins to one list, or None if they are not adjacent."""
    if not owns_groups(optimizer, checkpoint):
        return 0, 0
    names = checkpoint.head.names if checkpoint.head else RING_HEAD

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
