"""Optimizer state dicts as torch writes them: param groups with numbered parameters.

``{"state": {id: {slot: tensor | number}}, "param_groups": [{options…, "params": [id…]}]}``; since torch 2.6 a group may
also have ``param_names``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vraxion_ckpt.checkpoint.model import Checkpoint, UnboundCheckpoint
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, OptimizerPart, ParamGroup, UnboundOptimizer
from vraxion_ckpt.checkpoint.places import MISSING, value_at
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict, referenced, resolved
from vraxion_ckpt.errors import InconsistentError

Shape = tuple[int, ...]


def _differs_in_shape(slot: Any) -> bool:
    return isinstance(slot, str) and (bool({"row", "col"} & set(slot.split("_"))) or slot == "prev_flat_grad")


@dataclass(frozen=True)
class RawOptimizer:
    """A validated torch optimizer state dict. Its tensors are references.

    Attributes:
        part_of_group: the index of the optimizer to which each group belongs.
    """

    groups: list[dict[str, Any]]
    state: dict[int, dict[str, Any]]
    extra: dict[str, Any]
    part_of_group: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        """All parameter ids, group after group."""
        return [i for group in self.groups for i in group["params"]]

    @classmethod
    def parse(cls, raw: dict[str, Any], part_of_group: tuple[int, ...] = ()) -> RawOptimizer:
        """Validate the structure of a state dict with tensors or references.

        Args:
            raw: the state dict.
            part_of_group: see `UnboundOptimizer`.

        Raises:
            InconsistentError: the state dict is not what torch writes.
        """
        raw = referenced(raw)
        groups, state = raw.get("param_groups"), raw.get("state")
        if not isinstance(groups, list) or not isinstance(state, dict):
            raise InconsistentError("must have a dict `state` and a list `param_groups`", key="optimizer")
        for number, group in enumerate(groups):
            key = f"optimizer.param_groups[{number}]"
            if not isinstance(group, dict) or not isinstance(group.get("params"), list):
                raise InconsistentError("a param group must be a dict with a list `params`", key=key)
            if not all(isinstance(option, str) for option in group):
                raise InconsistentError("names of options must be text", key=key)
            if not all(type(i) is int for i in group["params"]):
                raise InconsistentError("parameter ids must be integers", key=key)
            names = group.get("param_names", [""] * len(group["params"]))
            if not isinstance(names, list) or len(names) != len(group["params"]):
                raise InconsistentError(f"must have {len(group['params'])} param_names, one per parameter", key=key)
            if not all(isinstance(name, str) for name in names):
                raise InconsistentError("param_names must be strings", key=key)
        extra = {key: value for key, value in raw.items() if key not in ("state", "param_groups")}
        parsed = cls(groups, state, extra, part_of_group or (0,) * len(groups))
        ids = parsed.ids
        known = set(ids)
        if len(known) != len(ids):
            raise InconsistentError("a parameter id occurs twice in the param groups", key="optimizer")
        for i, slots in state.items():
            if i not in known:
                raise InconsistentError(f"has state for id {i!r}, which is in no param group", key="optimizer.state")
            if not isinstance(slots, dict):
                raise InconsistentError("the state of a parameter must be a dict", key=f"optimizer.state[{i}]")
        return parsed

    def shapes(self) -> dict[int, Shape | None]:
        """Return the shape of each id's parameter, or None if its state does not determine the shape.

        If a slot (``exp_avg``) has dimensions for any parameter, it has the parameter's shape for every parameter, so a
        scalar in it means a scalar parameter. A slot that is always a scalar (``step``) gives no information.
        """
        tensors = {
            i: {slot: tuple(value.shape) for slot, value in slots.items() if isinstance(value, TensorRef)}
            for i, slots in self.state.items()
        }
        following = {slot for slots in tensors.values() for slot, shape in slots.items() if shape}
        told = {i: {slots[slot] for slot in following & slots.keys()} for i, slots in tensors.items()}
        # Adafactor's rows and columns are shorter than their parameter; L-BFGS has one vector for all parameters.
        tells = {i: not any(_differs_in_shape(slot) for slot in slots) for i, slots in self.state.items()}
        return {i: told[i].copy().pop() if len(told.get(i, ())) == 1 and tells[i] else None for i in self.ids}

    def shaped_groups(self) -> list[list[tuple[int, Shape | None]]]:
        """Return the ids of each group with the shapes of their parameters."""
        shapes = self.shapes()
        return [[(i, shapes[i]) for i in group["params"]] for group in self.groups]

    def of_parts(self, numbers: Collection[int]) -> RawOptimizer:
        """Return the groups of some optimizers, with their ids and state unchanged."""
        if set(numbers) >= set(self.part_of_group):
            return self
        kept = [i for i, number in enumerate(self.part_of_group) if number in numbers]
        groups = [self.groups[i] for i in kept]
        ids = {i for group in groups for i in group["params"]}
        state = {i: slots for i, slots in self.state.items() if i in ids}
        return replace(self, groups=groups, state=state, part_of_group=tuple(self.part_of_group[i] for i in kept))

    def named(self, names: Sequence[str], parts: tuple[OptimizerPart, ...]) -> Optimizer:
        """Return the optimizer with parameter names instead of ids.

        Args:
            names: the name of each id, in the order of `ids`.
            parts: the optimizers to which the groups belong.
        """
        name_of = dict(zip(self.ids, names, strict=True))
        groups = [
            ParamGroup(
                options=resolved({key: value for key, value in group.items() if key not in ("params", "param_names")}),
                params=[name_of[i] for i in group["params"]],
                keys=_keys_in_file(group, parts[number]),
                part=number,
            )
            for group, number in zip(self.groups, self.part_of_group, strict=True)
        ]
        state = {name_of[i]: dict(slots) for i, slots in self.state.items()}
        return Optimizer(groups, TensorDict(state), TensorDict(self.extra), parts=parts)


def _keys_in_file(group: Mapping[str, Any], part: OptimizerPart) -> tuple[str, ...]:
    is_listed = not part.is_by_name or part.listed is not None
    return tuple(key for key in group if is_listed or key != "param_names")


def digest(state_dict: Mapping[str, Any]) -> str:
    """Return a digest of a torch optimizer state dict that changes with every training step.

    Covers ids, slots, shapes and the first elements of every slot, so that names recorded for one state are not used
    for another state with the same structure.
    """
    found = hashlib.sha256(repr([group["params"] for group in state_dict["param_groups"]]).encode())
    for i, slots in referenced(state_dict["state"]).items():
        for slot, value in slots.items():
            found.update(repr((i, slot)).encode())
            if isinstance(value, TensorRef):
                found.update(repr((f"torch.{value.dtype}", value.shape)).encode())
                if value.is_contiguous():
                    size = min(16, value.numel()) * value.itemsize
                    found.update(value.storage.read(value.first * value.itemsize, size))
            elif isinstance(value, int | float | str):
                found.update(repr(value).encode())
    return found.hexdigest()


def unbind(optimizer: Optimizer) -> dict[str, Any]:
    """Return torch's state dict: ids 0 … P−1, group after group, and ``param_names`` where groups had them.

    The groups of parts that the file identifies by name always have ``param_names``. The tensors in ``state`` are
    references.
    """
    ids = {name: i for i, name in enumerate(optimizer.params)}
    groups = []
    for group in optimizer.groups:
        part = optimizer.parts[group.part]
        entries = {
            **group.options,
            "params": [ids[name] for name in group.params],
            "param_names": [part.in_file(name) for name in group.params],
        }
        wanted = [*group.options, "params", *(["param_names"] if part.is_by_name else [])]
        keys = [*group.keys, *(key for key in wanted if key not in group.keys)]
        groups.append({key: entries[key] for key in keys if key in entries})
    state = {ids[name]: slots for name, slots in optimizer.state.references().items()}
    return {"state": state, "param_groups": groups, **optimizer.extra.references()}


def as_unbound(optimizer: Optimizer) -> UnboundOptimizer:
    """Return an optimizer with numbered parameters, as a reader of the file that it is written to finds it."""
    part_of_group = tuple(group.part for group in optimizer.groups) if len(optimizer.parts) > 1 else ()
    return UnboundOptimizer(unbind(optimizer), parts=optimizer.parts, part_of_group=part_of_group)


def unknown_parameters(checkpoint: Checkpoint, listed: Sequence[str]) -> list[str]:
    """Return the names of parameters that the model does not have, as far as is known without opening a file."""
    tensors = checkpoint.open_references()
    if checkpoint.head is None:
        return [name for name in listed if name not in tensors]
    return checkpoint.head.unknown(listed, tensors)


def without_lost_optimizers(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint without the optimizers whose places are no longer in its payload."""
    held = checkpoint.unbound if isinstance(checkpoint, UnboundCheckpoint) else checkpoint.optimizer
    if held is None:
        return checkpoint
    payload = checkpoint.payload.as_stored()
    kept = [n for n, part in enumerate(held.parts) if not part.place or value_at(payload, part.place) is not MISSING]
    if len(kept) == len(held.parts):
        return checkpoint
    if not kept:
        return checkpoint.with_optimizer(None)
    parts = tuple(held.parts[number] for number in kept)
    if isinstance(held, Optimizer):
        groups = [replace(group, part=kept.index(group.part)) for group in held.groups if group.part in kept]
        names = {name for group in groups for name in group.params}
        state = {name: slots for name, slots in held.state.references().items() if name in names}
        extra = _extra_of(held.extra.references(), parts)
        return checkpoint.with_optimizer(
            replace(held, groups=groups, state=TensorDict(state), extra=TensorDict(extra), parts=parts)
        )
    raw = RawOptimizer.parse(held.state_dict, held.part_of_group).of_parts(kept)
    state_dict = {"state": raw.state, "param_groups": raw.groups, **_extra_of(raw.extra, parts)}
    numbers = tuple(kept.index(number) for number in raw.part_of_group) if len(parts) > 1 else ()
    return checkpoint.with_unbound(UnboundOptimizer(state_dict, parts=parts, part_of_group=numbers))


def _extra_of(extra: Mapping[str, Any], parts: Sequence[OptimizerPart]) -> dict[str, Any]:
    """Return what `Optimizer.extra` is if only some of several parts are left."""
    if len(parts) == 1:
        return dict(extra.get(parts[0].label, {}))
    return {part.label: extra[part.label] for part in parts if part.label in extra}


def known_shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    """Return the shapes of the model tensors that are available without opening a file, by name."""
    return {name: tensor.shape for name, tensor in checkpoint.open_references().items()}


@dataclass(frozen=True)
class ShapeConflict:
    """A slot whose shape contradicts the parameter to which it is bound.

    Attributes:
        name: name of the parameter.
        what: the contradiction, as text.
    """

    name: str
    what: str


def _is_reduced(shape: Shape, whole: Shape) -> bool:
    """Return whether `shape` is `whole` without one of its dimensions, or with some dimensions reduced to 1."""
    if len(shape) == len(whole):
        return all(size in (1, full) for size, full in zip(shape, whole, strict=True))
    return any(shape == whole[:i] + whole[i + 1 :] for i in range(len(whole)))


def shape_conflicts(optimizer: Optimizer, shapes: Mapping[str, Shape]) -> Iterator[ShapeConflict]:
    """Yield the slots whose shapes contradict the known shapes of their parameters.

    A slot that has its parameter's shape for some parameters must have it for all. A slot that never has it is
    accepted, as in Adafactor and 8-bit optimizers. The exception: if each of its shapes is the shape of some other
    parameter, and not every one is a reduced shape of its own parameter, the names are probably wrong.
    """
    alike: set[str] = set()  # slots that have their parameter's shape for some parameters
    differing: dict[str, list[tuple[str, Shape]]] = {}
    for name, slots in optimizer.state.references().items():
        whole = shapes.get(name)
        for slot, value in slots.items() if whole is not None else ():
            if type(value) is TensorRef and value.shape:
                if value.shape == whole:
                    alike.add(slot)
                else:
                    differing.setdefault(slot, []).append((name, value.shape))
    parameters = {shapes[name] for name in optimizer.params if name in shapes} if differing else set()
    for slot, wrong in differing.items():
        reduced = all(_is_reduced(shape, shapes[name]) for name, shape in wrong)
        if slot in alike or (not reduced and all(shape in parameters for _, shape in wrong)):
            for name, shape in wrong:
                yield ShapeConflict(name, f"slot {slot} has shape {list(shape)}, its parameter {list(shapes[name])}")
