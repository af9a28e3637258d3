"""Optimizer ids on disk ↔ parameter names in memory.

``torch.optim.Optimizer.state_dict()`` numbers parameters through its groups and knows no names; loading one maps
numbers to live parameters by position. Surgery that adds, renames or removes parameters must therefore know
which parameter every number stands for. Where names come from, in order of trust:

1. ``param_names`` inside the param groups (torch ≥ 2.6, optimizers built from ``named_parameters()``);
2. a list that an earlier conversion recorded, or the payload's ``param_names``;
3. inference: the one assignment, if there is exactly one, that respects order and shapes.

A list that the user gives wins over all of these.

A payload's ``param_names`` lists the model's parameters in ``named_parameters()`` order, which is the order of
the ids only if the optimizer has one group. With several groups the names are known but not their places, and
inference finds those. However names were found, counts and the shape of every non-scalar slot are checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import Tensor

from vraxion_ckpt.errors import BindingError, InconsistentError
from vraxion_ckpt.model import Checkpoint, Head, Optimizer, ParamGroup
from vraxion_ckpt.plain import bytes_of

THREE_WAYS_OUT = (
    "give the names (--param-names FILE: one name a line, in optimizer order), leave the optimizer behind "
    "(--optimizer drop), or save with names (build the optimizer from model.named_parameters())"
)
_MOST_STATES = 400_000  # partial assignments that inference looks at before it gives up

Shape = tuple[int, ...]


def bind(checkpoint: Checkpoint, given: Sequence[str] | None = None) -> Checkpoint:
    """Give names to the ids of `checkpoint.unbound`; without one, return the checkpoint as it is.

    Args:
        checkpoint: as an adapter read it.
        given: every parameter's name in optimizer order, from the user; wins over what the payload says.

    Raises:
        BindingError: no names, not exactly one assignment, or names that do not fit the state.
        InconsistentError: the optimizer state is not what torch writes.
    """
    if checkpoint.unbound is None:
        return checkpoint
    raw = _RawOptimizer.parse(checkpoint.unbound.state_dict)
    recorded = checkpoint.unbound.names
    if recorded is not None and digest(checkpoint.unbound.state_dict) != checkpoint.unbound.digest:
        recorded = None  # a trainer has carried the record along and gone on; its optimizer may be another one
    _check_group_names(raw, given if given is not None else recorded)
    if given is not None:
        names, bound_by = _positional(raw, given, "the given list"), "given names"
    elif raw.groups and all("param_names" in group or not group["params"] for group in raw.groups):
        listed = [name for group in raw.groups for name in group.get("param_names", ())]
        names, bound_by = _positional(raw, listed, "the param groups' param_names"), "param_names of the groups"
    elif recorded is not None:
        names, bound_by = _positional(raw, recorded, "the recorded names"), "names recorded by vraxion_ckpt"
    elif checkpoint.param_names is not None and len(raw.groups) == 1:
        names = _positional(raw, checkpoint.param_names, "the payload's param_names")
        bound_by = "param_names of the payload"
    elif checkpoint.param_names is not None:
        _check_count(raw, checkpoint.param_names, "the payload's param_names")
        checkpoint.open_experts()
        shapes = known_shapes(checkpoint)
        names = _infer(raw, [(name, shapes.get(name)) for name in checkpoint.param_names])
        bound_by = "param_names of the payload, placed by order and shape"
    else:
        names = _infer(raw, _candidates(checkpoint.state_dict()))
        bound_by = "order and shape"
    shapes = known_shapes(checkpoint)
    _check_known(names, checkpoint.head, shapes)
    optimizer = _named(raw, names, bound_by)
    check_shapes(optimizer, shapes)
    param_names = checkpoint.param_names
    if param_names is None:
        places = {name: i for i, name in enumerate(checkpoint.tensor_names())}
        param_names = tuple(sorted(names, key=lambda name: places.get(name, len(places))))
    return replace(checkpoint, optimizer=optimizer, unbound=None, param_names=param_names)


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
    groups = []
    for group in optimizer.groups:
        entries = {
            **group.options,
            "params": [ids[name] for name in group.params],
            "param_names": list(group.params),
        }
        keys = [*group.keys, *(k for k in [*group.options, "params"] if k not in group.keys)]
        groups.append({key: entries[key] for key in keys if key in entries})
    state = {ids[name]: slots for name, slots in optimizer.state.items()}
    return {"state": state, "param_groups": groups, **optimizer.extra}


def known_shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    """Return the shapes of the model tensors that are at hand without opening a file."""
    return {name: tuple(tensor.shape) for name, tensor in checkpoint.open_tensors().items()}


def check_shapes(optimizer: Optimizer, shapes: Mapping[str, Shape]) -> None:
    """Compare every non-scalar slot with its parameter, where the parameter's shape is known.

    Raises:
        BindingError: naming the first slot that disagrees.
    """
    for name, slots in optimizer.state.items():
        for slot, value in slots.items():
            if name in shapes and isinstance(value, Tensor) and value.ndim and tuple(value.shape) != shapes[name]:
                raise BindingError(
                    f"slot {slot} has shape {list(value.shape)}, its parameter {list(shapes[name])}",
                    key=name,
                    hint=THREE_WAYS_OUT,
                )


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


def _check_group_names(raw: _RawOptimizer, given: Sequence[str] | None) -> None:
    """Names in the groups are the most trusted; what contradicts them, or some groups without any, is refused."""
    named = [group.get("param_names") for group in raw.groups if group["params"]]
    if given is None and None in named and any(names is not None for names in named):
        raise BindingError("only some of the param groups name their parameters", hint=THREE_WAYS_OUT)
    if given is None or len(given) != len(raw.ids):
        return
    place = 0
    for group in raw.groups:
        wanted = list(given[place : place + len(group["params"])])
        place += len(group["params"])
        if group.get("param_names", wanted) != wanted:
            raise BindingError("the given list contradicts the param_names of the param groups", hint=THREE_WAYS_OUT)


def _check_count(raw: _RawOptimizer, names: Sequence[str], whose: str) -> None:
    if len(names) != len(raw.ids):
        raise BindingError(
            f"{len(names)} names are in {whose}, {len(raw.ids)} parameters in the optimizer", hint=THREE_WAYS_OUT
        )
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or name in seen:
            raise BindingError(f"{whose} list {name!r} twice or not as text", hint=THREE_WAYS_OUT)
        seen.add(name)


def _check_known(names: Sequence[str], head: Head | None, known: Mapping[str, Shape]) -> None:
    """Every name must be a tensor's, or of an expert that is not open or was deleted."""
    for name in names:
        if name not in known and not (head and head.is_not_at_hand(name)):
            raise BindingError("the model has no such parameter", key=name, hint=THREE_WAYS_OUT)


def _positional(raw: _RawOptimizer, names: Sequence[str], whose: str) -> list[str]:
    _check_count(raw, names, whose)
    return list(names)


def _named(raw: _RawOptimizer, names: list[str], bound_by: str) -> Optimizer:
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

    Integer and bool tensors cannot. Of tied tensors only the first is one, as in ``named_parameters()``.
    """
    seen: set[tuple[int, int, Shape]] = set()
    found: list[tuple[str, Shape | None]] = []
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        shape = tuple(tensor.shape)
        place = (tensor.data_ptr(), tensor.numel(), shape)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        found.append((name, shape))
    return found


# A partial assignment: how many ids of each group have their name already.
_State = tuple[int, ...]
# What may happen to a name: it goes to the next id of a group, or it is no parameter of this optimizer.
_SKIP = -1


def _infer(raw: _RawOptimizer, names: Sequence[tuple[str, Shape | None]]) -> list[str]:
    """Find the one assignment of names to ids that keeps every group's order and agrees in every shape.

    Within a group, torch keeps the order in which parameters were given, and people filter
    ``named_parameters()``; between groups nothing is known, so ids of different groups may interleave.

    Works through the names in order; a state is how far each group has come. The first pass finds all states
    that can be reached, the second counts, from the end, the ways to finish from each (no further than
    two). The binding is unique if there is one way from the start.

    Raises:
        BindingError: none or several; says at which name they part.
    """
    shapes = raw.shapes()
    groups = [[(i, shapes[i]) for i in group["params"]] for group in raw.groups]
    total = sum(map(len, groups))
    if total > len(names):
        raise BindingError(
            f"the optimizer has {total} parameters, the model only {len(names)} tensors that can be one",
            hint=THREE_WAYS_OUT,
        )

    def moves(state: _State, shape: Shape | None) -> Iterable[tuple[int, _State]]:
        yield _SKIP, state
        for number, done in enumerate(state):
            if done < len(groups[number]):
                wanted = groups[number][done][1]
                if wanted is None or shape is None or wanted == shape:
                    yield number, (*state[:number], done + 1, *state[number + 1 :])

    end = tuple(map(len, groups))
    layers: list[set[_State]] = [{tuple(0 for _ in groups)}]
    seen = 0
    for place, (_, shape) in enumerate(names):
        left = len(names) - place - 1
        reached = {after for state in layers[-1] for _, after in moves(state, shape) if total - sum(after) <= left}
        seen += len(reached)
        if seen > _MOST_STATES:
            raise BindingError("too many possible assignments of optimizer ids to names", hint=THREE_WAYS_OUT)
        layers.append(reached)

    ways: list[dict[_State, int]] = [{} for _ in layers]
    ways[-1] = {end: 1} if end in layers[-1] else {}
    for place in range(len(names) - 1, -1, -1):
        later = ways[place + 1]
        for state in layers[place]:
            count = sum(later.get(after, 0) for _, after in moves(state, names[place][1]))
            if count:
                ways[place][state] = min(2, count)

    if not ways[0]:
        raise BindingError(_explain_none(groups, names), hint=THREE_WAYS_OUT)
    state = next(iter(layers[0]))
    found: list[list[str]] = [[] for _ in groups]
    for place, (name, shape) in enumerate(names):
        open_moves = [(number, after) for number, after in moves(state, shape) if after in ways[place + 1]]
        if len(open_moves) > 1:
            choices = " or ".join(_describe(groups, state, number) for number, _ in open_moves)
            raise BindingError(
                f"cannot tell which optimizer id is which: {name} {_text(shape)} could be {choices}",
                hint=THREE_WAYS_OUT,
            )
        number, state = open_moves[0]
        if number != _SKIP:
            found[number].append(name)
    return [name for group in found for name in group]


def _describe(groups: Sequence[Sequence[tuple[int, Shape | None]]], state: _State, number: int) -> str:
    if number == _SKIP:
        return "no parameter (a buffer)"
    i, shape = groups[number][state[number]]
    return f"id {i} ({'no state' if shape is None else _text(shape)})"


def _explain_none(
    groups: Sequence[Sequence[tuple[int, Shape | None]]], names: Sequence[tuple[str, Shape | None]]
) -> str:
    available: Collection[Shape | None] = {shape for _, shape in names}
    strangers = ((i, shape) for group in groups for i, shape in group if shape and shape not in available)
    for i, shape in islice(strangers, 1):
        return f"no assignment of optimizer ids fits: no tensor has the shape {_text(shape)} of id {i}"
    return "no assignment of optimizer ids to the model's tensors keeps their order and fits their shapes"


def _text(shape: Shape | None) -> str:
    return "of unknown shape" if shape is None else str(list(shape))


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
