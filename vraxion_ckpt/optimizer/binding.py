"""Bind the numbered optimizer state of a file to parameter names.

``torch.optim.Optimizer.state_dict()`` numbers parameters, group after group, and stores no names. Loading maps numbers
to parameters by position. To add, rename or remove parameters, the parameter of every number must be known. Names are
taken from the first of these sources that has any:

1. a list that the user gives (it must not contradict the next source);
2. ``param_names`` in the param groups (torch ≥ 2.6, optimizers built from ``named_parameters()``);
3. a list that an earlier conversion recorded for exactly this state, then the payload's ``param_names``;
4. inference (`vraxion_ckpt.optimizer.inference`), by the order that the user states or that a recognised trainer
   (`vraxion_ckpt.optimizer.trainers`) uses, otherwise by shapes alone.

The payload's ``param_names`` are in optimizer order if there is one group, or one group for each parameter, or if they
are not in the model's order. Otherwise, each group is assumed to be in the model's order, if exactly one such
assignment fits and no other usual order gives a different one. Names that remain ambiguous are kept in
`Optimizer.undecided`. A chain is refused only if it changes one of them. For every source, the number of names and the
shapes of slots are checked.

If a file has several optimizers, those whose parameters have names in the file are bound first, and the others, as if
they were one, to what remains. The user's list and order then apply to the others. No parameter may be in two.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from vraxion_ckpt.checkpoint.model import Checkpoint, UnboundCheckpoint
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, OptimizerPart
from vraxion_ckpt.checkpoint.order_rules import OrderKind, Rule, explains
from vraxion_ckpt.checkpoint.torch_optimizer import (
    RawOptimizer,
    digest,
    known_shapes,
    shape_conflicts,
    unknown_parameters,
)
from vraxion_ckpt.errors import BindingError
from vraxion_ckpt.optimizer.assignment import WAYS_OUT
from vraxion_ckpt.optimizer.inference import FoundNames, OptimizerOrder, infer_names, trainable
from vraxion_ckpt.optimizer.parameter_names import (
    check_count,
    check_groups_named,
    common_prefixes,
    in_model,
    names_in_groups,
)
from vraxion_ckpt.optimizer.parameter_order import lists_of, model_order, order_of
from vraxion_ckpt.wording import count
from vraxion_ckpt.wording import listed as listed_in_words


def bind(checkpoint: Checkpoint, given: Sequence[str] | None = None, order: OptimizerOrder | None = None) -> Checkpoint:
    """Bind the optimizer of an `UnboundCheckpoint` to parameter names.

    Args:
        checkpoint: a checkpoint as an adapter read it. If its parameters already have names, only `order` is recorded.
        given: the parameter names in optimizer order, if the user lists them. They replace the names in the file.
        order: the order of every param group, if the user states it.

    Raises:
        BindingError: no assignment fits, or names or the order contradict the state.
        InconsistentError: the optimizer state is not what torch writes.
    """
    if not isinstance(checkpoint, UnboundCheckpoint):
        return _with_stated_order(checkpoint, order) if order is not None else checkpoint
    raw = RawOptimizer.parse(checkpoint.unbound.state_dict, checkpoint.unbound.part_of_group)
    bound = _bound(checkpoint, raw, given, order)
    shapes = known_shapes(checkpoint)
    for name in unknown_parameters(checkpoint, bound.params):
        raise BindingError("the model has no such parameter", key=name, hint=WAYS_OUT)
    for conflict in shape_conflicts(bound, shapes):
        raise BindingError(conflict.what, key=conflict.name, hint=WAYS_OUT)
    param_names = checkpoint.param_names
    if param_names is None:
        places = {name: i for i, name in enumerate(checkpoint.tensor_names())}
        param_names = tuple(sorted(bound.params, key=lambda name: places.get(name, len(places))))
    found = replace(checkpoint.with_optimizer(bound), param_names=param_names)
    return found if order is None else _with_stated_order(found, order, _to_name(raw, checkpoint.unbound.parts))


def _with_stated_order(checkpoint: Checkpoint, order: OptimizerOrder, numbers: Collection[int] = ()) -> Checkpoint:
    """Record the order that the user states for optimizers with known names. Refuse it if the names contradict it.

    Args:
        checkpoint: the checkpoint.
        order: the stated order.
        numbers: the optimizers to which the order applies; all if empty. Those that torch loads by name have none.
    """
    optimizer, rule = checkpoint.optimizer, Rule(OrderKind(order))
    if optimizer is None:
        return checkpoint
    parts = list(optimizer.parts)
    for number, part in enumerate(parts):
        if part.is_by_name or part.rules is not None or (numbers and number not in numbers):
            continue
        one = optimizer.of_part(number)
        lists = lists_of(one, checkpoint) or [group.params for group in one.groups]
        places = order_of(checkpoint)
        if not all(explains(rule, names, places) for names in lists):
            raise BindingError(f"the optimizer's parameters are not in the stated order '{order}'", key=str(part))
        parts[number] = replace(part, rules=(rule,))
    return replace(checkpoint, optimizer=replace(optimizer, parts=tuple(parts)))


def _bound(
    checkpoint: UnboundCheckpoint, raw: RawOptimizer, given: Sequence[str] | None, order: OptimizerOrder | None
) -> Optimizer:
    """Return the optimizer with names. Parts with names in the file come first, then all others together."""
    parts = checkpoint.unbound.parts
    others = _to_name(raw, parts) or (range(len(parts)) if given is not None else ())
    found: dict[int, FoundNames] = {}
    for number in range(len(parts)):
        if number not in others:
            listed = names_in_groups(raw.of_parts([number]))
            prefixes = common_prefixes(listed, checkpoint.core, checkpoint.head)
            names = [in_model(name, prefixes) for name in listed]
            bound_by = f"{parts[number].form} names" if parts[number].is_by_name else "param_names of the groups"
            check_count(raw.of_parts([number]), names, bound_by)
            found[number] = FoundNames(names, bound_by)
    if others:
        taken = {name for each in found.values() for name in each.names}
        together = raw.of_parts(others)
        named = _name_others(checkpoint, together, taken, given, order)
        check_count(together, named.names, named.bound_by)
        name_of = dict(zip(together.ids, named.names, strict=True))
        for number in others:
            found[number] = replace(named, names=[name_of[i] for i in raw.of_parts([number]).ids])
    _refuse_shared(found, parts)
    prefixed = tuple(
        replace(
            part,
            prefixes=common_prefixes(names_in_groups(raw.of_parts([number])), checkpoint.core, checkpoint.head),
            rules=found[number].rules,
        )
        for number, part in enumerate(parts)
    )
    bound = raw.named([name for number in range(len(parts)) for name in found[number].names], prefixed)
    return replace(
        bound,
        bound_by="; ".join(dict.fromkeys(found[number].bound_by for number in range(len(parts)))),
        undecided=frozenset(name for each in found.values() for name in each.undecided),
    )


def _to_name(raw: RawOptimizer, parts: Sequence[OptimizerPart]) -> list[int]:
    """Return the numbers of the optimizers whose parameters have no names in the file."""
    groups = [raw.of_parts([number]).groups for number in range(len(parts))]
    return [
        number
        for number, own in enumerate(groups)
        if not own or not all("param_names" in group or not group["params"] for group in own)
    ]


def _name_others(
    checkpoint: UnboundCheckpoint,
    raw: RawOptimizer,
    taken: Collection[str],
    given: Sequence[str] | None,
    order: OptimizerOrder | None,
) -> FoundNames:
    """Return the names of parameters that have none in the file, or that the user lists.

    Args:
        checkpoint: the checkpoint.
        raw: the optimizers to name, as one.
        taken: the names of the parameters of the other optimizers.
        given: the names that the user lists.
        order: the order that the user states.
    """
    unbound = checkpoint.unbound
    if given is not None:
        prefixes = common_prefixes(given, checkpoint.core, checkpoint.head)
        names = [in_model(name, prefixes) for name in given]
        _check_against_groups(checkpoint, raw, names)
        return FoundNames(names, "given names")
    # With another digest, a trainer has saved another state, perhaps of another optimizer, with the old record.
    if unbound.names is not None and digest(unbound.state_dict) == unbound.digest:
        names = [name for name in unbound.names if name not in taken]
        return FoundNames(names, "names recorded by vraxion_ckpt", unbound.undecided)
    check_groups_named(raw)
    if checkpoint.param_names is not None:
        listed = [name for name in checkpoint.param_names if name not in taken]
        return _named_by_payload(checkpoint, raw, listed, order)
    candidates = [pair for pair in trainable(checkpoint.state_references()) if pair[0] not in taken]
    several = [str(unbound.parts[number]) for number in dict.fromkeys(raw.part_of_group)]
    if len(several) > 1 and len(raw.ids) > len(candidates):
        raise BindingError(
            f"the optimizers {listed_in_words(several, 4)} have {count(len(raw.ids), 'parameter')} without names, but "
            f"only {len(candidates)} tensors can be parameters: some are in two of them",
            hint=_how_to_leave_out(unbound.parts[max(raw.part_of_group)]),
        )
    return infer_names(checkpoint, raw, candidates, stated=order)


def _refuse_shared(found: Mapping[int, FoundNames], parts: Sequence[OptimizerPart]) -> None:
    """Refuse a parameter that two optimizers have, because only one of them could keep its state."""
    owner: dict[str, int] = {}
    for number, each in sorted(found.items()):
        for name in each.names:
            other = owner.setdefault(name, number)
            if other != number:
                raise BindingError(
                    f"is in two optimizers, {parts[other]} and {parts[number]}",
                    key=name,
                    hint=_how_to_leave_out(parts[number] if parts[number].place else parts[other]),
                )


def _how_to_leave_out(part: OptimizerPart) -> str:
    return f"leave it out (--drop-key {part.place[0] if part.place else 'KEY'}), or all of them (--optimizer drop)"


def _check_against_groups(checkpoint: UnboundCheckpoint, raw: RawOptimizer, given: Sequence[str]) -> None:
    """Refuse a list that contradicts the ``param_names`` of the groups. A wrapper's prefix may differ."""
    if len(given) != len(raw.ids):
        return
    prefixes = common_prefixes(names_in_groups(raw), checkpoint.core, checkpoint.head)
    place = 0
    for group in raw.groups:
        wanted = list(given[place : place + len(group["params"])])
        place += len(group["params"])
        if [in_model(name, prefixes) for name in group.get("param_names", wanted)] != wanted:
            raise BindingError("the given names contradict the param_names of the param groups", hint=WAYS_OUT)


def _named_by_payload(
    checkpoint: UnboundCheckpoint, raw: RawOptimizer, listed: Sequence[str], order: OptimizerOrder | None
) -> FoundNames:
    check_count(raw, listed, "param_names of the payload")
    is_one = len(set(raw.part_of_group)) <= 1
    if len(raw.groups) == 1 or (is_one and all(len(group["params"]) == 1 for group in raw.groups)):
        return FoundNames(listed, "param_names of the payload")
    checkpoint.open_experts()
    shapes = known_shapes(checkpoint)
    models, _ = model_order(checkpoint)
    if is_one and models is not None and not explains(Rule(OrderKind.MODEL), list(listed), models):
        wanted = raw.shapes()
        pairs = [(wanted[i], shapes.get(name)) for i, name in zip(raw.ids, listed, strict=True)]
        if all(shape is None or known is None or shape == known for shape, known in pairs):
            return FoundNames(listed, "param_names of the payload, group after group")
    candidates = [(name, shapes.get(name)) for name in listed]
    names_from = "param_names of the payload, placed by "
    return infer_names(checkpoint, raw, candidates, stated=order, names_from=names_from)
