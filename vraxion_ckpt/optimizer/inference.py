"""Infer parameter names of numbered optimizer state from the order and the shapes of the model's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vraxion_ckpt.checkpoint.buffers import torch_buffers
from vraxion_ckpt.checkpoint.model import UnboundCheckpoint
from vraxion_ckpt.checkpoint.optimizer_state import is_only_usual
from vraxion_ckpt.checkpoint.order_rules import ModelOrder, OrderKind, Rule
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.shared_memory import without_tied
from vraxion_ckpt.checkpoint.torch_optimizer import RawOptimizer, Shape
from vraxion_ckpt.errors import BindingError
from vraxion_ckpt.optimizer.assignment import Assignment, Candidates, GroupShapes, by_shape, in_order
from vraxion_ckpt.optimizer.parameter_order import model_order
from vraxion_ckpt.optimizer.trainers import known_trainer
from vraxion_ckpt.wording import count

OptimizerOrder = Literal["model", "sorted", "reversed"]

# Orders that an unknown trainer may have used, and that shapes may distinguish.
_USUAL = (OrderKind.MODEL, OrderKind.SORTED, OrderKind.REVERSED, OrderKind.HEAD_FIRST, OrderKind.HEAD_LAST)


@dataclass(frozen=True)
class FoundNames:
    """The parameter names of numbered optimizer state.

    Attributes:
        names: the name of each id, group after group.
        bound_by: how they were found, see `Optimizer`.
        undecided: see `Optimizer`.
        rules: see `OptimizerPart`.
    """

    names: Sequence[str]
    bound_by: str
    undecided: frozenset[str] = frozenset()
    rules: tuple[Rule, ...] | None = None


def trainable(tensors: Mapping[str, TensorRef]) -> list[tuple[str, Shape | None]]:
    """Return name and shape of the tensors that can be parameters, in the given order.

    Integers, bools and buffers of torch's own modules are left out. Of tied tensors, only the first is returned, as
    ``named_parameters()`` does.
    """
    buffers = torch_buffers(tensors.keys())
    found = [
        (name, tensor)
        for name, tensor in tensors.items()
        if name not in buffers and (tensor.is_floating_point() or tensor.is_complex())
    ]
    return [(name, tensor.shape) for name, tensor in without_tied(found)]


def infer_names(
    checkpoint: UnboundCheckpoint,
    raw: RawOptimizer,
    candidates: Candidates,
    *,
    stated: OptimizerOrder | None,
    names_from: str = "",
) -> FoundNames:
    """Name the parameters of an optimizer by their order and shapes. If the order is unknown, use the shapes alone.

    Args:
        checkpoint: the checkpoint.
        raw: the checkpoint's optimizer, or several as one, with numbered parameters.
        candidates: name and shape of the tensors that can be parameters.
        stated: the order of every param group, if the user stated it.
        names_from: text about the source of the candidates, with which `Optimizer.bound_by` begins.

    Raises:
        BindingError: no assignment fits, or the model's order is needed but unknown.
    """
    if not raw.state and len(raw.groups) == 1 and len(raw.ids) == len(candidates):
        names = [name for name, _ in candidates]
        rules = (Rule(OrderKind.MODEL),)  # without state, any order is right
        return FoundNames(names, f"{names_from}order and shape: it has no state", rules=rules)
    groups = _lists_of_ids(raw)
    order, _ = model_order(checkpoint)
    kind, why = _known_order(checkpoint, order, stated)
    if kind is None:
        return _by_shapes(groups, candidates, order, checkpoint.param_names is not None, names_from)
    rule = Rule(kind)
    found = in_order(groups, _arranged(rule, candidates, order))
    bound_by = f"{names_from}order and shape: {rule} order, {why}{_undecided_text(found)}"
    return FoundNames(found.names, bound_by, found.undecided, (rule,))


def _by_shapes(
    groups: GroupShapes,
    candidates: Candidates,
    order: ModelOrder | None,
    is_listed: bool,
    names_from: str,
) -> FoundNames:
    by_shapes = by_shape(groups, candidates)
    undecided = by_shapes.undecided
    usual = _usual(groups, candidates, order)
    all_same = len({tuple(each.names) for each in usual.values()}) == 1
    as_model = usual.get(OrderKind.MODEL)
    if is_listed and as_model is not None and all_same and not any(each.undecided for each in usual.values()):
        bound_by = f"{names_from}order and shape: no other usual order fits"
        return FoundNames(as_model.names, bound_by, rules=tuple(map(Rule, usual)))
    first = next(iter(usual.values()), by_shapes)
    rules: tuple[Rule, ...] | None = None  # if all names are decided, the rules are computed when they are needed
    if undecided:
        rules = tuple(map(Rule, usual)) if all_same and order is not None else ()
    found = Assignment(first.names, undecided)
    return FoundNames(found.names, f"{names_from}shape alone{_undecided_text(found)}", undecided, rules)


def _known_order(
    checkpoint: UnboundCheckpoint, order: ModelOrder | None, stated: OptimizerOrder | None
) -> tuple[OrderKind | None, str]:
    if stated is not None:
        return OrderKind(stated), "as stated"
    trainer = known_trainer(checkpoint) if is_only_usual(checkpoint.unbound.parts) else None
    if trainer is None or order is None:
        return None, ""
    return OrderKind.MODEL, f"as {trainer} builds it"


def _arranged(rule: Rule, candidates: Candidates, order: ModelOrder | None) -> Candidates:
    shapes = dict(candidates)
    if order is None and rule.kind is not OrderKind.SORTED:
        raise BindingError(
            "the names of the state dict are sorted, so the model's order is unknown",
            key="model",
            hint="list the names (--param-names FILE: one name per line, in optimizer order)",
        )
    names = sorted(shapes) if order is None else rule.arranged(shapes, order)
    return [(name, shapes[name]) for name in names]


def _usual(groups: GroupShapes, candidates: Candidates, order: ModelOrder | None) -> dict[OrderKind, Assignment]:
    """Return, for each usual order in which the candidates fit the ids, the assignment."""
    found = {}
    for kind in _USUAL if order is not None else ():
        try:
            found[kind] = in_order(groups, _arranged(Rule(kind), candidates, order))
        except BindingError:
            continue
    return found


def _lists_of_ids(raw: RawOptimizer) -> GroupShapes:
    """Return the ids of each group with the shapes of their parameters.

    If all groups of an optimizer have one parameter each, they are joined, because trainers make them from one list.
    """
    lists: list[list[tuple[int, Shape | None]]] = []
    for number in dict.fromkeys(raw.part_of_group):
        pairs = zip(raw.shaped_groups(), raw.part_of_group, strict=True)
        groups = [group for group, part in pairs if part == number]
        joined = all(len(group) == 1 for group in groups)
        lists += [[pair for group in groups for pair in group]] if joined else groups
    return lists


def _undecided_text(found: Assignment) -> str:
    return f"; {count(len(found.undecided), 'name')} could belong to other ids" if found.undecided else ""
