"""Optimizer ids on disk ↔ parameter names in memory.

``torch.optim.Optimizer.state_dict()`` numbers parameters through its groups and knows no names; loading one maps
numbers to live parameters by position. Surgery that adds, renames or removes parameters must therefore know
which parameter every number stands for. Where names come from, in order of trust:

1. a list that the user gives (it must not contradict the next);
2. ``param_names`` inside the param groups (torch ≥ 2.6, optimizers built from ``named_parameters()``);
3. a list that an earlier conversion recorded for this very state, then the payload's ``param_names``;
4. inference from what is known. That an optimizer lists its parameters in some order is known if the user says so,
   or of trainers that are known (`vraxion_ckpt.trainers`). Otherwise only what the shapes alone decide is bound.

A payload's ``param_names`` is taken as the optimizer's order if there is one group, or one for each parameter, or if
it is not the model's order. A list in the model's order does not say in which order several groups list their
parameters: they are taken to be in the model's, too, if there is one such assignment and the shapes exclude the other
usual orders. What several assignments leave open is kept (`Optimizer.undecided`), and refused only where a chain
touches it. However names were found, counts are checked, and the shapes of slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from vraxion_ckpt.assignment import WAYS_OUT, Assignment, Candidates, Shape, by_shape, in_order
from vraxion_ckpt.buffers import torch_buffers
from vraxion_ckpt.errors import BindingError, InconsistentError
from vraxion_ckpt.model import Checkpoint, Head, Optimizer, ParamGroup
from vraxion_ckpt.order_rules import ModelOrder, OrderKind, Rule, explains
from vraxion_ckpt.parameter_order import lists_of, model_order, order_of
from vraxion_ckpt.plain import bytes_of
from vraxion_ckpt.trainers import known_trainer

OptimizerOrder = Literal["model", "sorted", "reversed"]

# Orders that an unknown trainer may have used, and that shapes alone may tell apart.
_USUAL = (OrderKind.MODEL, OrderKind.SORTED, OrderKind.REVERSED, OrderKind.HEAD_FIRST, OrderKind.HEAD_LAST)


def bind(checkpoint: Checkpoint, given: Sequence[str] | None = None, order: OptimizerOrder | None = None) -> Checkpoint:
    """Give names to the ids of `checkpoint.unbound`; without one, return the checkpoint as it is.

    Args:
        checkpoint: as an adapter read it.
        given: every parameter's name in optimizer order, from the user; wins over what the payload says.
        order: how the optimizer was built, from the user; holds for every param group.

    Raises:
        BindingError: no assignment fits, or names or an order contradict the state.
        InconsistentError: the optimizer state is not what torch writes.
    """
    if checkpoint.unbound is None:
        return _with_stated_order(checkpoint, order) if order is not None else checkpoint
    raw = _RawOptimizer.parse(checkpoint.unbound.state_dict)
    bound = _Binder(checkpoint, raw, order).bind(given)
    shapes = known_shapes(checkpoint)
    _check_known(bound.params, checkpoint.head, shapes)
    for line in shape_conflicts(bound, shapes):
        raise BindingError(line.what, key=line.name, hint=WAYS_OUT)
    param_names = checkpoint.param_names
    if param_names is None:
        places = {name: i for i, name in enumerate(checkpoint.tensor_names())}
        param_names = tuple(sorted(bound.params, key=lambda name: places.get(name, len(places))))
    found = replace(checkpoint, optimizer=bound, unbound=None, param_names=param_names)
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

    checkpoint: Checkpoint
    raw: _RawOptimizer
    order: OptimizerOrder | None

    def bind(self, given: Sequence[str] | None) -> Optimizer:
        """Take the names from the most trusted place that has some."""
        checkpoint, raw = self.checkpoint, self.raw
        unbound = checkpoint.unbound
        assert unbound is not None
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
        return self._infer(self._candidates(), "order and shape")

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
        found = _optimizer_of(self.raw, list(names), bound_by)
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

    def _candidates(self) -> Candidates:
        return _candidates(self.checkpoint.state_dict())

    def _infer(self, candidates: Candidates, how: str) -> Optimizer:
        """Bind by what is known of the order, else by what shapes alone decide."""
        stated, why = self._known_order()
        groups = self.raw.shaped_groups()
        order, _ = model_order(self.checkpoint)
        if stated is not None:
            rule = Rule(stated)
            names = self._arranged(rule, candidates, order)
            found = in_order(groups, names)
            bound = _optimizer_of(self.raw, found.names, f"{how}: {rule} order, {why}{_in_words(found)}")
            return replace(bound, undecided=found.undecided, rules=(rule,))
        undecided = by_shape(groups, candidates).undecided
        usual = self._usual(candidates, order)
        as_model = usual.get(OrderKind.MODEL)
        is_open = not _all_same(usual) or any(each.undecided for each in usual.values())
        if self.checkpoint.param_names is not None and as_model is not None and not is_open:
            bound = _optimizer_of(self.raw, as_model.names, f"{how}: no other usual order fits")
            return replace(bound, rules=tuple(map(Rule, usual)))
        first = next(iter(usual.values()), by_shape(groups, candidates))
        rules: tuple[Rule, ...] | None = None  # where the names are known, the order is looked at when it matters
        if undecided:
            rules = tuple(Rule(kind) for kind in usual) if _all_same(usual) and order is not None else ()
        found = Assignment(first.names, undecided)
        how = how.replace("order and shape", "shape alone")
        bound = _optimizer_of(self.raw, found.names, f"{how}{_in_words(found)}")
        return replace(bound, undecided=undecided, rules=rules)

    def _known_order(self) -> tuple[OrderKind | None, str]:
        if self.order is not None:
            return OrderKind(self.order), "as stated"
        trainer = known_trainer(self.checkpoint)
        if trainer is None or model_order(self.checkpoint)[0] is None:
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

    def _usual(self, candidates: Candidates, order: ModelOrder | None) -> dict[OrderKind, Assignment]:
        """Return an assignment for each usual order in which the candidates fit the ids."""
        found = {}
        for kind in _USUAL if order is not None else ():
            try:
                found[kind] = in_order(self.raw.shaped_groups(), self._arranged(Rule(kind), candidates, order))
            except BindingError:
                continue
        return found


def _all_same(found: Mapping[OrderKind, Assignment]) -> bool:
    return len({tuple(each.names) for each in found.values()}) == 1


def _in_words(found: Assignment) -> str:
    count = len(found.undecided)
    return f"; {count} name{'s' * (count != 1)} could belong to other ids" if count else ""


def _fits(wanted: Shape | None, shape: Shape | None) -> bool:
    return wanted is None or shape is None or wanted == shape


def _is_of(name: str, head: Head) -> bool:
    """Tell whether a name may be of the head: one of its tensors, or one that is not at hand."""
    if head.is_not_at_hand(name):
        return True
    return any(
        name.startswith(prefix) and name[len(prefix) :] in expert
        for i, expert in head.experts.items()
        if expert.is_open and name.startswith(prefix := head.prefix(i))
    )


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


def digest(state_dict: Mapping[str, Any]) -> str:
    """Return a digest of a torch optimizer state dict that changes with every training step.

    Covers ids, slots, shapes and the first elements of every slot: a record made for one state must not be taken
    for another that has the same form.
    """
    found = hashlib.sha256(repr([group["params"] for group in state_dict["param_groups"]]).encode())
    for i, slots in state_dict["state"].items():
        for slot, value in slots.items():
            found.update(repr((i, slot)).encode())
            if isinstance(value, Tensor):
                found.update(repr((str(value.dtype), tuple(value.shape))).encode())
                if value.is_contiguous():
                    found.update(bytes_of(value)[: 16 * value.itemsize].numpy().tobytes())
            elif isinstance(value, int | float | str):
                found.update(repr(value).encode())
    return found.hexdigest()


def unbind(optimizer: Optimizer) -> dict[str, Any]:
    """Return torch's form: ids 0 … P−1 through the groups, ``param_names`` in the groups that had them."""
    ids = {name: i for i, name in enumerate(optimizer.params)}
    theirs, models = optimizer.prefixes
    groups = []
    for group in optimizer.groups:
        entries = {
            **group.options,
            "params": [ids[name] for name in group.params],
            "param_names": [theirs + name.removeprefix(models) for name in group.params],
        }
        keys = [*group.keys, *(k for k in [*group.options, "params"] if k not in group.keys)]
        groups.append({key: entries[key] for key in keys if key in entries})
    state = {ids[name]: slots for name, slots in optimizer.state.items()}
    return {"state": state, "param_groups": groups, **optimizer.extra}


def known_shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    """Return the shapes of the model tensors that are at hand without opening a file."""
    return {name: tuple(tensor.shape) for name, tensor in checkpoint.open_tensors().items()}


@dataclass(frozen=True)
class ShapeConflict:
    """A slot that cannot be the state of the parameter it is bound to."""

    name: str
    what: str


def shape_conflicts(optimizer: Optimizer, shapes: Mapping[str, Shape]) -> Iterator[ShapeConflict]:
    """Yield the slots whose shapes contradict those of their parameters, where these are known.

    A kind of slot that has its parameter's shape for some parameters must have it for all. One that has it for none
    (Adafactor's rows and columns, the scales of 8-bit optimizers) is carried as it is, unless all of its shapes are
    those of other parameters: then the names are probably wrong.
    """
    kinds: dict[str, list[tuple[str, Shape]]] = {}
    for name, slots in optimizer.state.items():
        for slot, value in slots.items():
            if name in shapes and isinstance(value, Tensor) and value.ndim:
                kinds.setdefault(slot, []).append((name, tuple(value.shape)))
    parameters = {shapes[name] for name in optimizer.params if name in shapes}
    for slot, found in kinds.items():
        wrong = [(name, shape) for name, shape in found if shape != shapes[name]]
        if len(wrong) < len(found) or all(shape in parameters for _, shape in wrong):
            for name, shape in wrong:
                yield ShapeConflict(name, f"slot {slot} has shape {list(shape)}, its parameter {list(shapes[name])}")


@dataclass(frozen=True)
class _RawOptimizer:
    """A torch optimizer state dict that was looked at once."""

    groups: list[dict[str, Any]]
    state: dict[int, dict[str, Any]]
    extra: dict[str, Any]

    @property
    def ids(self) -> list[int]:
        return [i for group in self.groups for i in group["params"]]

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> _RawOptimizer:
        groups, state = raw.get("param_groups"), raw.get("state")
        if not isinstance(groups, list) or not isinstance(state, dict):
            raise InconsistentError("not an optimizer state: needs `state` and `param_groups`", key="optimizer")
        for number, group in enumerate(groups):
            key = f"optimizer.param_groups[{number}]"
            if not isinstance(group, dict) or not isinstance(group.get("params"), list):
                raise InconsistentError("a param group must be a dict with a list `params`", key=key)
            if not all(type(i) is int for i in group["params"]):
                raise InconsistentError("parameter ids must be whole numbers", key=key)
            names = group.get("param_names", [""] * len(group["params"]))
            if not isinstance(names, list) or len(names) != len(group["params"]):
                raise InconsistentError(f"has {len(group['params'])} params and another number of param_names", key=key)
            if not all(isinstance(name, str) for name in names):
                raise InconsistentError("param_names must be text", key=key)
        extra = {key: value for key, value in raw.items() if key not in ("state", "param_groups")}
        parsed = cls(groups, state, extra)
        ids = parsed.ids
        known = set(ids)
        if len(known) != len(ids):
            raise InconsistentError("a parameter id occurs twice in the param groups", key="optimizer")
        for i, slots in state.items():
            if i not in known:
                raise InconsistentError(f"state of id {i!r} belongs to no param group", key="optimizer.state")
            if not isinstance(slots, dict):
                raise InconsistentError("the state of a parameter must be a dict", key=f"optimizer.state[{i}]")
        return parsed

    def shapes(self) -> dict[int, Shape | None]:
        """Return the shape that each id's parameter must have, or None where its state does not tell.

        A slot that has dimensions for some parameter follows the parameters' shapes (``exp_avg``), so for a
        parameter where it has none the parameter has none; one that never has dimensions (``step``) tells nothing.
        """
        tensors = {
            i: {slot: tuple(value.shape) for slot, value in slots.items() if isinstance(value, Tensor)}
            for i, slots in self.state.items()
        }
        following = {slot for slots in tensors.values() for slot, shape in slots.items() if shape}
        told = {i: {slots[slot] for slot in following & slots.keys()} for i, slots in tensors.items()}
        return {i: told[i].copy().pop() if len(told.get(i, ())) == 1 else None for i in self.ids}

    def shaped_groups(self) -> list[list[tuple[int, Shape | None]]]:
        """Return the ids of each group with the shapes of their parameters."""
        shapes = self.shapes()
        return [[(i, shapes[i]) for i in group["params"]] for group in self.groups]


def _check_names_in_groups(raw: _RawOptimizer, given: Sequence[str] | None) -> None:
    """Names in the groups are trusted; some groups without any are refused unless a list is given."""
    named = [group.get("param_names") for group in raw.groups if group["params"]]
    if given is None and None in named and any(names is not None for names in named):
        raise BindingError("only some of the param groups name their parameters", hint=WAYS_OUT)


def _check_count(raw: _RawOptimizer, names: Sequence[str], whose: str) -> None:
    if len(names) != len(raw.ids):
        raise BindingError(
            f"{len(names)} names are in {whose}, {len(raw.ids)} parameters in the optimizer", hint=WAYS_OUT
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


def _optimizer_of(raw: _RawOptimizer, names: list[str], bound_by: str) -> Optimizer:
    name_of = dict(zip(raw.ids, names, strict=True))
    groups = [
        ParamGroup(
            options={key: value for key, value in group.items() if key not in ("params", "param_names")},
            params=[name_of[i] for i in group["params"]],
            keys=tuple(group),
        )
        for group in raw.groups
    ]
    state = {name_of[i]: dict(slots) for i, slots in raw.state.items()}
    return Optimizer(groups, state, raw.extra, bound_by)


def _candidates(tensors: Mapping[str, Tensor]) -> list[tuple[str, Shape | None]]:
    """List what can be a parameter, in state-dict order.

    Integer and bool tensors cannot, nor can what torch's own modules call buffers. Of tied tensors only the first is
    one, as in ``named_parameters()``.
    """
    buffers = torch_buffers(tensors.keys())
    seen: set[tuple[int, int, Shape]] = set()
    found: list[tuple[str, Shape | None]] = []
    for name, tensor in tensors.items():
        if name in buffers or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        shape = tuple(tensor.shape)
        place = (tensor.data_ptr(), tensor.numel(), shape)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        found.append((name, shape))
    return found


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
