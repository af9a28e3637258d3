"""An optimizer's state dict as torch writes it: parameters by number, in groups.

``{"state": {id: {slot: tensor | number}}, "param_groups": [{options…, "params": [id…]}]}``; since torch 2.6 a group may
also have ``param_names``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, ParamGroup
from vraxion_ckpt.checkpoint.plain_data import bytes_of
from vraxion_ckpt.errors import InconsistentError

Shape = tuple[int, ...]


def _is_of_parts(slot: Any) -> bool:
    return isinstance(slot, str) and (bool({"row", "col"} & set(slot.split("_"))) or slot == "prev_flat_grad")


@dataclass(frozen=True)
class RawOptimizer:
    """A torch optimizer state dict that was looked at once."""

    groups: list[dict[str, Any]]
    state: dict[int, dict[str, Any]]
    extra: dict[str, Any]

    @property
    def ids(self) -> list[int]:
        return [i for group in self.groups for i in group["params"]]

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> RawOptimizer:
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
        # Adafactor's rows and columns are shorter than their parameter; L-BFGS has one vector for all parameters.
        tells = {i: not any(_is_of_parts(slot) for slot in slots) for i, slots in self.state.items()}
        return {i: told[i].copy().pop() if len(told.get(i, ())) == 1 and tells[i] else None for i in self.ids}

    def shaped_groups(self) -> list[list[tuple[int, Shape | None]]]:
        """Return the ids of each group with the shapes of their parameters."""
        shapes = self.shapes()
        return [[(i, shapes[i]) for i in group["params"]] for group in self.groups]

    def named(self, names: Sequence[str], bound_by: str) -> Optimizer:
        """Return the optimizer with a name for each id, through the groups."""
        name_of = dict(zip(self.ids, names, strict=True))
        groups = [
            ParamGroup(
                options={key: value for key, value in group.items() if key not in ("params", "param_names")},
                params=[name_of[i] for i in group["params"]],
                keys=tuple(group),
            )
            for group in self.groups
        ]
        state = {name_of[i]: dict(slots) for i, slots in self.state.items()}
        return Optimizer(groups, state, self.extra, bound_by)


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


def _is_reduced(shape: Shape, whole: Shape) -> bool:
    """Tell whether a shape is another without one dimension, or with some dimensions of one."""
    if len(shape) == len(whole):
        return all(size in (1, full) for size, full in zip(shape, whole, strict=True))
    return any(shape == whole[:i] + whole[i + 1 :] for i in range(len(whole)))


def shape_conflicts(optimizer: Optimizer, shapes: Mapping[str, Shape]) -> Iterator[ShapeConflict]:
    """Yield the slots whose shapes contradict those of their parameters, where these are known.

    A kind of slot that has its parameter's shape for some parameters must have it for all. One that has it for none
    (Adafactor's rows and columns, the scales of 8-bit optimizers) is carried as it is, unless all of its shapes are
    those of other parameters and no means over a dimension of their own: then the names are probably wrong.
    """
    kinds: dict[str, list[tuple[str, Shape]]] = {}
    for name, slots in optimizer.state.items():
        for slot, value in slots.items():
            if name in shapes and isinstance(value, Tensor) and value.ndim:
                kinds.setdefault(slot, []).append((name, tuple(value.shape)))
    parameters = {shapes[name] for name in optimizer.params if name in shapes}
    for slot, found in kinds.items():
        wrong = [(name, shape) for name, shape in found if shape != shapes[name]]
        reduced = all(_is_reduced(shape, shapes[name]) for name, shape in wrong)
        if len(wrong) < len(found) or (not reduced and all(shape in parameters for _, shape in wrong)):
            for name, shape in wrong:
                yield ShapeConflict(name, f"slot {slot} has shape {list(shape)}, its parameter {list(shapes[name])}")
