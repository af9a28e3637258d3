"""Optimizer ids on disk ↔ parameter names in memory.

``torch.optim.Optimizer.state_dict()`` numbers parameters through its groups and knows no names; loading one maps
numbers to live parameters by position. Surgery that adds, renames or removes parameters must therefore know
which parameter every number stands for. Where names come from, in order of trust:

1. a list that the user gives (it must not contradict the next);
2. ``param_names`` inside the param groups (torch ≥ 2.6, optimizers built from ``named_parameters()``);
3. a list that an earlier conversion recorded for this very state, then the payload's ``param_names``;
4. inference from what is known. That an optimizer lists its parameters in some order is known if the user says so,
   or of trainers that are known (`vraxion_ckpt.optimizer.trainers`). Otherwise only what the
   shapes alone decide is bound.

A payload's ``param_names`` is taken as the optimizer's order if there is one group, or one for each parameter, or if
it is not the model's order. A list in the model's order does not say in which order several groups list their
parameters: they are taken to be in the model's, too, if there is one such assignment and the shapes exclude the other
usual orders. What several assignments leave open is kept (`Optimizer.undecided`), and refused only where a chain
touches it. However names were found, counts are checked, and the shapes of slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from vraxion_ckpt.checkpoint.buffers import torch_buffers
from vraxion_ckpt.checkpoint.head_names import split_name
from vraxion_ckpt.checkpoint.model import Checkpoint, Head, Optimizer, UnboundCheckpoint
from vraxion_ckpt.checkpoint.order_rules import ModelOrder, OrderKind, Rule, explains
from vraxion_ckpt.checkpoint.shared_memory import without_tied
from vraxion_ckpt.checkpoint.torch_optimizer import RawOptimizer, Shape, digest, known_shapes, shape_conflicts
from vraxion_ckpt.errors import BindingError, InconsistentError
from vraxion_ckpt.optimizer.assignment import WAYS_OUT, Assignment, Candidates, GroupShapes, by_shape, in_order
from vraxion_ckpt.optimizer.parameter_order import lists_of, model_order, order_of
from vraxion_ckpt.optimizer.trainers import known_trainer
from vraxion_ckpt.wording import count

OptimizerOrder = Literal["model", "sorted", "reversed"]

# Orders that an unknown trainer may have used, and that shapes alone may tell apart.
_USUAL = (OrderKind.MODEL, OrderKind.SORTED, OrderKind.REVERSED, OrderKind.HEAD_FIRST, OrderKind.HEAD_LAST)


def bind(checkpoint: Checkpoint, given: Sequence[str] | None = None, order: OptimizerOrder | None = None) -> Checkpoint:
    """Bind the optimizer of an `UnboundCheckpoint` to parameter names; return any other checkpoint as it is.

    Args:
        checkpoint: as an adapter read it.
        given: every parameter's name in optimizer order, from the user; wins over what the payload says.
        order: how the optimizer was built, from the user; holds for every param group.

    Raises:
        BindingError: no assignment fits, or names or an order contradict the state.
        InconsistentError: the optimizer state is not what torch writes.
    """
    if not isinstance(checkpoint, UnboundCheckpoint):
        return _with_stated_order(checkpoint, order) if order is not None else checkpoint
    raw = RawOptimizer.parse(checkpoint.unbound.state_dict)
    bound = _Binder(checkpoint, raw, order).bind(given)
    shapes = known_shapes(checkpoint)
    _check_known(bound.params, checkpoint.head, shapes)
    for line in shape_conflicts(bound, shapes):
        raise BindingError(line.what, key=line.name, hint=WAYS_OUT)
    param_names = checkpoint.param_names
    if param_names is None:
        places = {name: i for i, name in enumerate(checkpoint.tensor_names())}
        param_names = tuple(sorted(bound.params, key=lambda name: places.get(name, len(places))))
    found = replace(checkpoint.with_optimizer(bound), param_names=param_names)
    return _with_stated_order(found, order) if order is not None and bound.rules is None else found


def _with_stated_order(checkpoint: Checkpoint, order: OptimizerOrder) -> Checkpoint:
    """Note the order that the user states of an optimizer whose names are known, if it is the one found."""
    optimizer, rule = checkpoint.optimizer, Rule(OrderKind(order))
    if optimizer is None:
        return checkpoint
    lists = lists_of(optimizer, checkpoint) or [group.params for group in optimizer.groups]
    places = order_of(checkpoint)
    if not all(explains(rule, names, places) for names in lists):
        raise BindingError(
            f"the optimizer's parameters do not stand in the order '{order}' that was stated", key="optimizer"
        )
    return replace(checkpoint, optimizer=replace(optimizer, rules=(rule,)))


@dataclass(frozen=True)
class _Binder:
    """Finds the names of one optimizer's ids."""

    checkpoint: UnboundCheckpoint
    raw: RawOptimizer
    order: OptimizerOrder | None

    def bind(self, given: Sequence[str] | None) -> Optimizer:
        """Take the names from the most trusted place that has some."""
        checkpoint, raw = self.checkpoint, self.raw
        unbound = checkpoint.unbound
        recorded = unbound.names
        if recorded is not None and digest(unbound.state_dict) != unbound.digest:
            recorded = None  # a trainer has carried the record along and gone on; its optimizer may be another one
        _check_names_in_groups(raw, given if given is not None else recorded)
        if given is not None:
            prefixes = self._prefixes(given)
            names = [_without(name, prefixes) for name in given]
            self._check_against_groups(names)
            return self._named(names, "given names")
        if raw.groups and all("param_names" in group or not group["params"] for group in raw.groups):
            return self._named(self._names_in_groups(), "param_names of the groups")
        if recorded is not None:
            found = self._named(recorded, "names recorded by vraxion_ckpt")
            return replace(found, undecided=unbound.undecided)
        if checkpoint.param_names is not None:
            return self._bind_listed(checkpoint.param_names)
        return self._infer(_candidates(checkpoint.state_dict()), "order and shape")

    # --- names that are listed ---

    def _prefixes(self, listed: Sequence[str]) -> tuple[str, str]:
        """Return the wrapper's prefix that all listed names have and the model's have not, and the other way round."""
        known, head = self.checkpoint.core, self.checkpoint.head
        return common_prefixes(listed, known, lambda name: head is not None and _is_of(name, head))

    def _names_in_groups(self) -> list[str]:
        listed = self._listed_in_groups()
        prefixes = self._prefixes(listed)
        return [_without(name, prefixes) for name in listed]

    def _listed_in_groups(self) -> list[str]:
        return [name for group in self.raw.groups for name in group.get("param_names", ())]

    def _check_against_groups(self, given: Sequence[str]) -> None:
        """Refuse a list of the user's that contradicts names in the groups, wherever these have a wrapper's prefix."""
        if len(given) != len(self.raw.ids):
            return
        prefixes = self._prefixes(self._listed_in_groups())
        place = 0
        for group in self.raw.groups:
            wanted = list(given[place : place + len(group["params"])])
            place += len(group["params"])
            if [_without(name, prefixes) for name in group.get("param_names", wanted)] != wanted:
                raise BindingError("the given list contradicts the param_names of the param groups", hint=WAYS_OUT)

    def _named(self, names: Sequence[str], bound_by: str) -> Optimizer:
        _check_count(self.raw, names, bound_by)
        found = self.raw.named(names, bound_by)
        return replace(found, prefixes=self._prefixes(self._listed_in_groups()))

    def _bind_listed(self, listed: Sequence[str]) -> Optimizer:
        """Bind by the payload's param_names."""
        _check_count(self.raw, listed, "param_names of the payload")
        if len(self.raw.groups) == 1 or all(len(group["params"]) == 1 for group in self.raw.groups):
            return self._named(listed, "param_names of the payload")
        self.checkpoint.open_experts()
        shapes = known_shapes(self.checkpoint)
        order, _ = model_order(self.checkpoint)
        in_models_order = order is None or explains(Rule(OrderKind.MODEL), list(listed), order)
        if not in_models_order:
            wanted = self.raw.shapes()
            if all(_fits(wanted[i], shapes.get(name)) for i, name in zip(self.raw.ids, listed, strict=True)):
                return self._named(listed, "param_names of the payload, through the groups")
        candidates = [(name, shapes.get(name)) for name in listed]
        return self._infer(candidates, "param_names of the payload, placed by order and shape")

    # --- inference ---

    def _infer(self, candidates: Candidates, how: str) -> Optimizer:
        """Bind by what is known of the order, else by what shapes alone decide."""
        if not self.raw.state and len(self.raw.groups) == 1 and len(self.raw.ids) == len(candidates):
            bound = self.raw.named([name for name, _ in candidates], f"{how}: it has no state")
            return replace(bound, rules=(Rule(OrderKind.MODEL),))  # without state, no order is wrong
        groups = self.raw.shaped_groups()
        order, _ = model_order(self.checkpoint)
        stated, why = self._known_order(order)
        if stated is not None:
            rule = Rule(stated)
            names = self._arranged(rule, candidates, order)
            found = in_order(_joined(groups), names)
            bound = self.raw.named(found.names, f"{how}: {rule} order, {why}{_in_words(found)}")
            return replace(bound, undecided=found.undecided, rules=(rule,))
        by_shapes = by_shape(groups, candidates)
        undecided = by_shapes.undecided
        usual = self._usual(_joined(groups), candidates, order)
        as_model = usual.get(OrderKind.MODEL)
        is_open = not _all_same(usual) or any(each.undecided for each in usual.values())
        if self.checkpoint.param_names is not None and as_model is not None and not is_open:
            bound = self.raw.named(as_model.names, f"{how}: no other usual order fits")
            return replace(bound, rules=tuple(map(Rule, usual)))
        first = next(iter(usual.values()), by_shapes)
        rules: tuple[Rule, ...] | None = None  # where the names are known, the order is looked at when it matters
        if undecided:
            rules = tuple(Rule(kind) for kind in usual) if _all_same(usual) and order is not None else ()
        found = Assignment(first.names, undecided)
        how = how.replace("order and shape", "shape alone")
        bound = self.raw.named(found.names, f"{how}{_in_words(found)}")
        return replace(bound, undecided=undecided, rules=rules)

    def _known_order(self, order: ModelOrder | None) -> tuple[OrderKind | None, str]:
        if self.order is not None:
            return OrderKind(self.order), "as stated"
        trainer = known_trainer(self.checkpoint)
        if trainer is None or order is None:
            return None, ""
        return OrderKind.MODEL, f"as {trainer} builds it"

    def _arranged(self, rule: Rule, candidates: Candidates, order: ModelOrder | None) -> Candidates:
        shapes = dict(candidates)
        if order is None and rule.kind is not OrderKind.SORTED:
            raise BindingError(
                "the names of the state dict stand sorted, so the model's order is not known",
                key="model",
                hint="give the names (--param-names FILE: one name a line, in optimizer order)",
            )
        names = sorted(shapes) if order is None else rule.arranged(shapes, order)
        return [(name, shapes[name]) for name in names]

    def _usual(
        self, groups: GroupShapes, candidates: Candidates, order: ModelOrder | None
    ) -> dict[OrderKind, Assignment]:
        """Return an assignment for each usual order in which the candidates fit the ids."""
        found = {}
        for kind in _USUAL if order is not None else ():
            try:
                found[kind] = in_order(groups, self._arranged(Rule(kind), candidates, order))
            except BindingError:
                continue
        return found


def _joined(groups: GroupShapes) -> GroupShapes:
    """Return the groups; where each has one parameter, all of them as one list, since they were made in one order."""
    if all(len(group) == 1 for group in groups):
        return [[pair for group in groups for pair in group]]
    return groups


def _all_same(found: Mapping[OrderKind, Assignment]) -> bool:
    return len({tuple(each.names) for each in found.values()}) == 1


def _in_words(found: Assignment) -> str:
    return f"; {count(len(found.undecided), 'name')} could belong to other ids" if found.undecided else ""


def _fits(wanted: Shape | None, shape: Shape | None) -> bool:
    return wanted is None or shape is None or wanted == shape


def _is_of(name: str, head: Head) -> bool:
    """Tell whether a name may be of the head: one of its tensors, or one that is not at hand."""
    if head.is_not_at_hand(name):
        return True
    found = split_name(name, head.names)
    expert = head.experts.get(found[0]) if found else None
    return found is not None and expert is not None and name == head.prefix(found[0]) + found[1] and found[1] in expert


def common_prefixes(
    listed: Sequence[str], core: Mapping[str, Any], is_of_head: Callable[[str], bool]
) -> tuple[str, str]:
    """Return the prefix that every listed name has beyond the model's, and the one that the model's have beyond it.

    Wrappers put one before all names (``module.``, ``_orig_mod.``): of the optimizer's names, or of the state dict's.
    Both are empty where the names are the model's, and where no prefix makes them so.
    """

    def known(names: Sequence[str]) -> bool:
        return all(name in core or is_of_head(name) for name in names)

    if not listed or known(listed):
        return "", ""
    first = listed[0]
    for end in [i + 1 for i, char in enumerate(first) if char == "."]:
        prefix = first[:end]
        if all(name.startswith(prefix) for name in listed) and known([name[end:] for name in listed]):
            return prefix, ""
    for name in core:
        if name.endswith(f".{first}"):
            prefix = name[: -len(first)]
            if known([prefix + each for each in listed]):
                return "", prefix
    return "", ""


def _without(name: str, prefixes: tuple[str, str]) -> str:
    """Return the model's name for one that a wrapper's prefix was put before."""
    theirs, models = prefixes
    return models + name.removeprefix(theirs) if name.startswith(theirs) else name


def _check_names_in_groups(raw: RawOptimizer, given: Sequence[str] | None) -> None:
    """Names in the groups are trusted; some groups without any are refused unless a list is given."""
    named = [group.get("param_names") for group in raw.groups if group["params"]]
    if given is None and None in named and any(names is not None for names in named):
        raise BindingError("only some of the param groups name their parameters", hint=WAYS_OUT)


def _check_count(raw: RawOptimizer, names: Sequence[str], whose: str) -> None:
    if len(names) != len(raw.ids):
        raise BindingError(
            f"the number of names differs from that of parameters: {len(names)} in {whose}, "
            f"{len(raw.ids)} in the optimizer",
            hint=WAYS_OUT,
        )
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or name in seen:
            raise BindingError(f"{whose} list {name!r} twice or not as text", hint=WAYS_OUT)
        seen.add(name)


def _check_known(names: Sequence[str], head: Head | None, known: Mapping[str, Shape]) -> None:
    """Every name must be a tensor's, or of an expert that is not open or was deleted."""
    for name in names:
        if name not in known and not (head and head.is_not_at_hand(name)):
            raise BindingError("the model has no such parameter", key=name, hint=WAYS_OUT)


def _candidates(tensors: Mapping[str, Tensor]) -> list[tuple[str, Shape | None]]:
    """List what can be a parameter, in state-dict order.

    Integer and bool tensors cannot, nor can what torch's own modules call buffers. Of tied tensors only the first is
    one, as in ``named_parameters()``.
    """
    buffers = torch_buffers(tensors.keys())
    trainable = [
        (name, tensor)
        for name, tensor in tensors.items()
        if name not in buffers and (tensor.is_floating_point() or tensor.is_complex())
    ]
    return [(name, tuple(tensor.shape)) for name, tensor in without_tied(trainable)]


def names_in_payload(value: Any) -> tuple[str, ...] | None:
    """Check and return a payload's ``param_names``.

    Raises:
        InconsistentError: not a list of text.
    """
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InconsistentError("must be a list of names", key="param_names")
    return tuple(value)
