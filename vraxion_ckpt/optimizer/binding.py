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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vraxion_ckpt.checkpoint.model import Checkpoint, UnboundCheckpoint
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer
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
from vraxion_ckpt.optimizer.inference import OptimizerOrder, infer_names, trainable
from vraxion_ckpt.optimizer.parameter_names import (
    check_count,
    check_groups_named,
    common_prefixes,
    in_model,
    names_in_groups,
)
from vraxion_ckpt.optimizer.parameter_order import lists_of, model_order, order_of


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
    raw = RawOptimizer.parse(checkpoint.unbound.state_dict)
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
    return _with_stated_order(found, order) if order is not None and bound.rules is None else found


def _with_stated_order(checkpoint: Checkpoint, order: OptimizerOrder) -> Checkpoint:
    """Record the order that the user states for an optimizer with known names. Refuse it if the names contradict it."""
    optimizer, rule = checkpoint.optimizer, Rule(OrderKind(order))
    if optimizer is None:
        return checkpoint
    lists = lists_of(optimizer, checkpoint) or [group.params for group in optimizer.groups]
    places = order_of(checkpoint)
    if not all(explains(rule, names, places) for names in lists):
        raise BindingError(f"the optimizer's parameters are not in the stated order '{order}'", key="optimizer")
    return replace(checkpoint, optimizer=replace(optimizer, rules=(rule,)))


def _bound(
    checkpoint: UnboundCheckpoint, raw: RawOptimizer, given: Sequence[str] | None, order: OptimizerOrder | None
) -> Optimizer:
    unbound = checkpoint.unbound
    recorded = unbound.names
    if recorded is not None and digest(unbound.state_dict) != unbound.digest:
        recorded = None  # a trainer has saved another state, perhaps of another optimizer, with the old record
    if given is not None:
        prefixes = common_prefixes(given, checkpoint.core, checkpoint.head)
        names = [in_model(name, prefixes) for name in given]
        _check_against_groups(checkpoint, raw, names)
        return _named(checkpoint, raw, names, "given names")
    if recorded is None:
        check_groups_named(raw)
    if raw.groups and all("param_names" in group or not group["params"] for group in raw.groups):
        listed = names_in_groups(raw)
        prefixes = common_prefixes(listed, checkpoint.core, checkpoint.head)
        return _named(checkpoint, raw, [in_model(name, prefixes) for name in listed], "param_names of the groups")
    if recorded is not None:
        return replace(_named(checkpoint, raw, recorded, "names recorded by vraxion_ckpt"), undecided=unbound.undecided)
    if checkpoint.param_names is not None:
        return _bound_by_payload(checkpoint, raw, checkpoint.param_names, order)
    return infer_names(checkpoint, raw, trainable(checkpoint.state_references()), stated=order)


def _named(checkpoint: UnboundCheckpoint, raw: RawOptimizer, names: Sequence[str], bound_by: str) -> Optimizer:
    check_count(raw, names, bound_by)
    prefixes = common_prefixes(names_in_groups(raw), checkpoint.core, checkpoint.head)
    return replace(raw.named(names, bound_by), prefixes=prefixes)


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


def _bound_by_payload(
    checkpoint: UnboundCheckpoint, raw: RawOptimizer, listed: Sequence[str], order: OptimizerOrder | None
) -> Optimizer:
    check_count(raw, listed, "param_names of the payload")
    if len(raw.groups) == 1 or all(len(group["params"]) == 1 for group in raw.groups):
        return _named(checkpoint, raw, listed, "param_names of the payload")
    checkpoint.open_experts()
    shapes = known_shapes(checkpoint)
    models, _ = model_order(checkpoint)
    if models is not None and not explains(Rule(OrderKind.MODEL), list(listed), models):
        wanted = raw.shapes()
        pairs = [(wanted[i], shapes.get(name)) for i, name in zip(raw.ids, listed, strict=True)]
        if all(shape is None or known is None or shape == known for shape, known in pairs):
            return _named(checkpoint, raw, listed, "param_names of the payload, group after group")
    candidates = [(name, shapes.get(name)) for name in listed]
    names_from = "param_names of the payload, placed by "
    return infer_names(checkpoint, raw, candidates, stated=order, names_from=names_from)
