"""Order the parameters of a changed model as its trainer will build the optimizer.

A transform determines the parameters, their param groups and their sources (`Checkpoint.ancestors`). This module
determines their order, by the rule that explains the order before the step
(`vraxion_ckpt.optimizer.parameter_order`). If no rule determines the order, the step is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vraxion_ckpt.checkpoint.head import HeadKind
from vraxion_ckpt.checkpoint.head_names import RING_HEAD, split_name, split_names
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, OptimizerPart, ParamGroup
from vraxion_ckpt.checkpoint.order_rules import RESULT_ORDER, ModelOrder, Rule, explains
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.errors import BindingError, UsageError
from vraxion_ckpt.optimizer.assignment import WAYS_OUT
from vraxion_ckpt.optimizer.parameter_order import (
    explain,
    insert_groups,
    lists_of,
    order_of,
    owns_groups,
    run_of_groups,
)
from vraxion_ckpt.wording import count

BY_NAME_WITHOUT_STATE = (
    "would have no optimizer state, but torch loads an optimizer that is identified by name only if each parameter has"
)


def place_in_order(before: Checkpoint, after: Checkpoint) -> Checkpoint:
    """Return `after` with its optimizer's parameters in the order in which the trainer will build the optimizer.

    Args:
        before: the checkpoint before a step.
        after: the checkpoint after the step.

    Raises:
        BindingError: no rule explains the order before the step, or several rules give different orders.
    """
    old, new = before.optimizer, after.optimizer
    if old is None or new is None or _groups(old) == _groups(new):
        return after
    refuse_divided_experts(before)
    if len(old.parts) != len(new.parts):
        raise BindingError("the transform has added or removed an optimizer", key="optimizer", hint=RESULT_ORDER)
    groups: list[ParamGroup] = []
    parts: list[OptimizerPart] = []
    for was, now in zip(old.each_part(), new.each_part(), strict=True):
        (part,) = now.parts
        if _groups(was) == _groups(now):
            groups += now.groups
        else:
            rules, placed = _in_order(_Step(before, after, was, now))
            part = replace(part, rules=rules)
            groups += placed
        parts.append(part)
    return _placed(before, after, groups, tuple(parts))


def refuse_divided_experts(before: Checkpoint) -> None:
    """Refuse to change the head if its experts are divided over optimizers or param groups by their ids.

    It is then unknown where the trainer puts each expert of the changed model, and torch loads state by position. A
    group for each expert, or for each parameter, in one optimizer is no such division. Neither is state by name.

    Raises:
        BindingError: tensors of the same leaf, but of different experts, are in several optimizers or groups.
    """
    assert before.optimizer is not None
    names = before.head.names if before.head else RING_HEAD
    places: dict[str, tuple[int, int]] = {}  # optimizer and group, by leaf
    for number, one in enumerate(before.optimizer.each_part()):
        owns = owns_groups(one, before)
        for index, group in enumerate(one.groups if not one.parts[0].is_by_name else ()):
            for name in group.params:
                found = split_name(name, names)
                place = (number, -1 if owns else index)
                if found is not None and places.setdefault(found[1], place) != place:
                    raise BindingError(
                        "the experts are divided over several optimizers or param groups, so it is unknown where the "
                        "trainer puts each expert of the changed model",
                        path=before.origin.path,
                        key=name,
                        hint="save state by name (torch.distributed.checkpoint.state_dict), or use --optimizer drop",
                    )


def _in_order(step: _Step) -> tuple[tuple[Rule, ...], list[ParamGroup]]:
    """Return the rules that order the parameters of one optimizer, and its groups after the step."""
    (part,) = step.old.parts
    rules = part.rules if part.rules is not None else explain(step.old, step.before)
    if part.is_by_name:  # the order has no effect, so no rule is needed
        try:
            return rules, _by_rule(rules[0], step) if rules else step.new.groups
        except BindingError:
            return (), step.new.groups
    if not rules:
        raise BindingError(
            "no known rule explains the order of the optimizer's parameters, so their order in the changed model is "
            "unknown",
            path=step.before.origin.path,
            key=str(part),
            hint=RESULT_ORDER,
        )
    placed = [(_by_rule(rule, step), rule) for rule in rules]
    first = placed[0][0]
    for groups, rule in placed[1:]:
        if [group.params for group in groups] != [group.params for group in first]:
            raise BindingError(
                f"the order of the optimizer's parameters can be '{rules[0]}' or '{rule}', and these give different "
                "orders for the changed model",
                path=step.before.origin.path,
                key=str(part),
                hint=RESULT_ORDER,
            )
    return rules, first


def _placed(
    before: Checkpoint, after: Checkpoint, groups: list[ParamGroup], parts: tuple[OptimizerPart, ...]
) -> Checkpoint:
    """Return `after` with these groups. Keep `param_names` in the optimizer's order if they were in that order."""
    assert before.optimizer is not None
    assert after.optimizer is not None
    after.optimizer = _with_groups(replace(after.optimizer, parts=parts), groups)
    if before.param_names == tuple(before.optimizer.params):
        after.param_names = tuple(after.optimizer.params)
    return after


def place_as_listed(before: Checkpoint, after: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """Return `after` with its optimizer's parameters in the order of a list.

    Optimizers that torch loads by name have no order. Their parameters may be in the list, but need not.

    Raises:
        UsageError: no optimizer has an order, or the list does not contain each of their parameters exactly once.
        BindingError: the parameters of a group are not adjacent in the list.
    """
    optimizer = after.optimizer
    if optimizer is None:
        raise UsageError("--result-order cannot be applied: the result has no optimizer")
    if before.optimizer is not None and _groups(before.optimizer) != _groups(optimizer):
        refuse_divided_experts(before)
    parts = optimizer.each_part()
    needed = {name for one in parts if not one.parts[0].is_by_name for name in one.params}
    if not needed:
        raise UsageError("--result-order cannot be applied: the optimizer is loaded by name, so it has no order")
    lacking = sorted(needed - set(names))
    unknown = sorted(set(names) - set(optimizer.params))
    if lacking or unknown or len(set(names)) != len(names):
        what = "lists a name twice"
        if lacking or unknown:
            what = f"lacks {lacking[0]}" if lacking else f"lists {unknown[0]}, which is not in the result's optimizer"
        raise UsageError(f"--result-order {what}; it must list each of {len(needed)} parameters once")
    places = {name: i for i, name in enumerate(names) if name in needed}
    ordered: list[ParamGroup] = []
    groups: list[ParamGroup] = []
    for one in parts:
        if one.parts[0].is_by_name:
            groups += one.groups
            continue
        own = [replace(group, params=sorted(group.params, key=places.__getitem__)) for group in one.groups]
        if owns_groups(one, after):
            own.sort(key=lambda group: places[group.params[0]] if group.params else -1)
        groups += own
        ordered += own
    if [name for group in ordered for name in group.params] != list(places):
        raise BindingError(
            "--result-order mixes the parameters of several param groups", hint="list the names group after group"
        )
    return _placed(before, after, groups, tuple(replace(part, rules=()) for part in optimizer.parts))


def refuse_undecided(before: Checkpoint, after: Checkpoint) -> None:
    """Refuse a step that changes a parameter whose optimizer state is undecided.

    Raises:
        BindingError: the step changes such a parameter. The error names the first one.
    """
    optimizer = before.optimizer
    if optimizer is None or not optimizer.undecided or after.optimizer is None:
        return
    touched = {*after.ancestors, *(ancestor.prefix for ancestor in after.ancestors.values())}
    present, known = set(after.optimizer.params), set(optimizer.params)
    changed = {
        name
        for name in optimizer.undecided
        if (name in known) != (name in present)
        or not _is_there(name, after)
        or any(name[:end] in touched for end in (i + 1 for i in range(len(name)) if name[i] == "."))
    }
    for name in sorted(changed):
        raise BindingError(
            "the chain changes this parameter, but its optimizer state is not known for certain; the optimizer was "
            f"bound by {optimizer.bound_by}",
            path=before.origin.path,
            key=name,
            hint=WAYS_OUT,
        )


def _is_there(name: str, checkpoint: Checkpoint) -> bool:
    """Return whether the model has a tensor of this name. For a name in the head, only the expert id is checked."""
    head = checkpoint.head
    if head is None or not (name.startswith(head.names.single) or name.startswith(head.names.experts)):
        return name in checkpoint.core
    found = split_name(name, head.names)
    return (
        found is not None
        and name.startswith(head.prefix(found[0]))
        and (found[0] in head.experts or found[0] in head.deleted)
    )


def _groups(optimizer: Optimizer) -> list[list[str]]:
    return [group.params for group in optimizer.groups]


def _with_groups(optimizer: Optimizer, groups: list[ParamGroup]) -> Optimizer:
    """Return an optimizer with these groups, and with the state in the order of their parameters, as torch does."""
    order = [name for group in groups for name in group.params]
    held = optimizer.state.references()
    state = {name: held[name] for name in order if name in held}
    return replace(optimizer, groups=groups, state=TensorDict({**state, **held}))


@dataclass(frozen=True)
class _Step:
    """The checkpoints before and after a step, one of their optimizers, and what is the same for all rules."""

    before: Checkpoint
    after: Checkpoint
    old: Optimizer
    new: Optimizer

    @cached_property
    def run(self) -> tuple[int, int] | None:
        """See `run_of_groups`."""
        return run_of_groups(self.old, self.before)

    @cached_property
    def lists(self) -> list[list[str]] | None:
        """See `lists_of`."""
        return lists_of(self.old, self.before)

    @cached_property
    def orders(self) -> tuple[ModelOrder, ModelOrder]:
        """The model's order before and after the step. If both are equal, they are one object with one set of ranks."""
        was, now = order_of(self.before), order_of(self.after)
        return was, was if was == now else now


def _by_rule(rule: Rule, step: _Step) -> list[ParamGroup]:
    """Return the groups after a step in the order of a rule."""
    old, groups = step.old, step.new.groups
    run, lists = step.run, step.lists
    if run is None or lists is None:
        raise BindingError("the param groups of the experts are not adjacent", key="optimizer", hint=RESULT_ORDER)
    start, end = run
    behind = len(old.groups) - end  # number of groups after the run
    inner = groups[start : len(groups) - behind]
    if end == start:
        if len(groups) != len(old.groups):
            raise BindingError("the transform has added or removed a param group", key="optimizer", hint=RESULT_ORDER)
        inner = []
        start = len(groups)
        behind = 0
    arranged = [
        replace(group, params=_arranged(rule, number, group.params, step))
        for number, group in enumerate(groups[:start])
    ]
    if inner:
        names = [name for group in inner for name in group.params]
        order = _arranged(rule, start, names, step)
        places = {name: i for i, name in enumerate(order)}
        inside = [replace(group, params=sorted(group.params, key=places.__getitem__)) for group in inner]
        inside.sort(key=lambda group: places[group.params[0]])
        if [name for group in inside for name in group.params] != order:
            raise BindingError(
                f"the order '{rule}' mixes the parameters of several param groups", key="optimizer", hint=RESULT_ORDER
            )
        arranged += inside
    for number, group in enumerate(groups[len(groups) - behind :] if behind else ()):
        at = len(lists) - behind + number
        arranged.append(replace(group, params=_arranged(rule, at, group.params, step)))
    return arranged


def _arranged(rule: Rule, number: int, names: list[str], step: _Step) -> list[str]:
    """Return the names of a list in the order of a rule. If the list before the step has the same names, return it."""
    assert step.lists is not None
    found = step.lists[number]
    former = set(found)
    if former == set(names):
        return found
    if found and names and not any(step.after.former_name(name) in former for name in names):
        raise BindingError("the transform has replaced or moved a param group", key=names[0], hint=RESULT_ORDER)
    was, order = step.orders if rule.orders is None else (rule.orders[number],) * 2
    if not explains(rule, found, was):
        raise BindingError(
            f"the parameters would be ordered by '{rule}', but their group is in another order",
            key=found[0] if found else "optimizer",
            hint=RESULT_ORDER,
        )
    return rule.arranged(names, order)


# --- optimizers that lack parameters ---


def missing_parameters(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the expert parameters that the optimizer lacks although it has the same leaf of another expert.

    A closed expert is assumed to have the same leaves as the others.
    """
    head, optimizer = checkpoint.head, checkpoint.optimizer
    if head is None or optimizer is None:
        return
    everyone = {*head.experts, *head.deleted}
    split = split_names(tuple(optimizer.params), head.names)
    is_complete = head.kind is HeadKind.EXPERTS and all(everyone <= ids for ids in split.experts.values())
    if is_complete and not any(split_name(name, head.names) for name in split.others):
        return
    known = set(optimizer.params)
    leaves = dict.fromkeys(found[1] for name in optimizer.params if (found := split_name(name, head.names)))
    for i in sorted(everyone):
        expert = head.experts.get(i)
        for leaf in leaves:
            if head.prefix(i) + leaf not in known and not (expert and expert.is_open and leaf not in expert):
                yield head.prefix(i) + leaf


def is_undecided_in_head(checkpoint: Checkpoint) -> bool:
    """Return whether the optimizer state of any parameter of the head is undecided."""
    head, optimizer = checkpoint.head, checkpoint.optimizer
    undecided = optimizer.undecided if optimizer else ()
    return head is not None and any(split_name(name, head.names) for name in undecided)


def with_missing_parameters(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose optimizer also lists the missing expert parameters, in order and without state.

    Each parameter joins the param group of the first expert that has the same leaf.

    Raises:
        BindingError: it is unknown which parameters are missing, or where they belong in the order.
    """
    missing = list(missing_parameters(checkpoint))
    head, optimizer = checkpoint.head, checkpoint.optimizer
    if head is None or optimizer is None or not missing:
        return checkpoint
    if is_undecided_in_head(checkpoint):
        raise BindingError(
            f"the optimizer lacks {count(len(missing), 'parameter')} of experts, and it is unknown which ones",
            key="optimizer",
            hint="list the names of the parameters that it has, in its order (--param-names FILE: one name per line)",
        )
    new = optimizer.copy()
    owns = [owns_groups(one, checkpoint) for one in optimizer.each_part()]
    group_of = {name: group for group in new.groups for name in group.params}
    added: dict[tuple[int, int], ParamGroup] = {}
    for name in missing:
        found = split_name(name, head.names)
        assert found is not None
        expert, leaf = found
        sibling = next(n for n in optimizer.params if (other := split_name(n, head.names)) and other[1] == leaf)
        group = group_of[sibling]
        if optimizer.parts[group.part].is_by_name and sibling in optimizer.state:
            raise BindingError(BY_NAME_WITHOUT_STATE, key=name, hint="drop the optimizer (--optimizer drop)")
        if owns[group.part]:
            key = (expert, id(group))
            if key not in added:
                added[key] = replace(group, params=[])
            group = added[key]
        group.params.append(name)
    insert_groups(new, list(added.values()), checkpoint)
    whole = place_in_order(checkpoint, replace(checkpoint, optimizer=new))
    if whole.param_names is not None and not set(missing) <= set(whole.param_names):
        names = list({*whole.param_names, *missing})
        ranks = dict(zip(names, order_of(checkpoint).ranks_of(names), strict=True))
        whole.param_names = tuple(sorted(names, key=ranks.__getitem__))
    return whole
