"""Find the optimizers in a payload dict, and write them back in their places and forms.

Optimizers are found by their content, under any key. A payload has one, a list or a dict of several, or several keys.
Each is in one of the forms of `OptimizerForm`. They are read as one optimizer as torch writes it: the groups of all,
one after the other, with numbered parameters (`UnboundOptimizer`). In the canonical payload, None takes their places.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vraxion_ckpt.checkpoint.comparison import differences
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, OptimizerForm, OptimizerPart, UnboundOptimizer
from vraxion_ckpt.checkpoint.places import value_at, with_value_at
from vraxion_ckpt.checkpoint.torch_optimizer import RawOptimizer, as_unbound
from vraxion_ckpt.errors import InconsistentError, errors_at

_DEEPEST = 4  # number of keys that lead to an optimizer
_LONGEST = 1000  # longest list that is searched
_STATE, _GROUPS = "state.", "param_groups."


@dataclass(frozen=True)
class FoundOptimizers:
    """The optimizers of a payload dict.

    Attributes:
        entries: the payload with None in the places of the optimizers.
        unbound: the optimizers, or None if there are none.
        key: the usual key under which the payload has an optimizer, or None instead of one.
    """

    entries: dict[str, Any]
    unbound: UnboundOptimizer | None
    key: str | None


# --- find ---


def find_optimizers(payload: Mapping[str, Any], usual_keys: Sequence[str], others: Collection[str]) -> FoundOptimizers:
    """Return the optimizers of a payload dict with references.

    Args:
        payload: the payload.
        usual_keys: the keys under which trainers of this kind keep their only optimizer.
        others: keys that hold no optimizers.

    Raises:
        InconsistentError: an optimizer is inconsistent, or what a usual key holds is not one.
    """
    entries = {key: value for key, value in payload.items() if key not in others}
    found = list(_search(entries, ()))
    usual = [key for key in usual_keys if key in entries]
    filled = [key for key in usual if not _is_empty(entries[key])]
    if not found and filled:
        if len(filled) > 1:
            raise InconsistentError(f"holds two optimizers, {' and '.join(f'`{key}`' for key in filled)}")
        value = entries[filled[0]]
        if not isinstance(value, dict):
            raise InconsistentError(f"is a {type(value).__name__}, not a dict", key=filled[0])
        found = [((filled[0],), OptimizerForm.NUMBERED)]  # binding it says what is wrong
    places = [place for place, _ in found]
    at_usual = next((key for key in usual if (key,) in places), None)
    key = at_usual or next((key for key in usual if entries[key] is None), None)
    if not found:
        return FoundOptimizers(entries, None, key)
    parts = [
        (OptimizerPart(() if place == (at_usual,) else place, form), value_at(entries, place)) for place, form in found
    ]
    labels = [part.label for part, _ in parts]
    if len(set(labels)) < len(labels):
        raise InconsistentError("holds two optimizers under keys that look the same", key=max(labels, key=labels.count))
    for place in places:
        entries = with_value_at(entries, place, None)
    return FoundOptimizers(entries, _joined(parts), key)


def _is_empty(value: Any) -> bool:
    """Return whether a value under a usual key has no optimizer: it is None, or a container of nothing else."""
    if isinstance(value, list | tuple):
        return all(map(_is_empty, value))
    return value is None or (isinstance(value, dict) and bool(value) and all(map(_is_empty, value.values())))


def _search(value: Any, place: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], OptimizerForm]]:
    """Yield place and form of each optimizer in a value."""
    if len(place) > _DEEPEST:
        return
    if isinstance(value, dict):
        if place and (form := _form_of(value)):
            yield place, form
            return
        for key, entry in value.items():
            if isinstance(entry, dict | list | tuple) and type(key) in (str, int):
                yield from _search(entry, (*place, key))
    elif isinstance(value, list | tuple) and len(value) <= _LONGEST:
        for i, entry in enumerate(value):
            if isinstance(entry, dict | list | tuple):
                yield from _search(entry, (*place, i))


def _form_of(value: dict[Any, Any]) -> OptimizerForm | None:
    """Return the form of an optimizer, or None for any other dict."""
    groups, state = value.get("param_groups"), value.get("state")
    if isinstance(groups, list) and isinstance(state, dict):
        if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
            return None
        kinds = {type(each) for group in groups for each in group["params"]} or set(map(type, state))
        if kinds <= {int}:
            return OptimizerForm.NUMBERED
        return OptimizerForm.NESTED if kinds == {str} and value.keys() == {"state", "param_groups"} else None
    has_options = all(isinstance(key, str) and key.startswith((_STATE, _GROUPS)) for key in value)
    return OptimizerForm.FLATTENED if has_options and any(key.startswith(_GROUPS) for key in value) else None


def _joined(parts: Sequence[tuple[OptimizerPart, dict[str, Any]]]) -> UnboundOptimizer:
    """Return several optimizers, each with its value in the payload, as one with numbered parameters."""
    if len(parts) == 1 and not parts[0][0].is_by_name:
        part, value = parts[0]
        usual = ["state", "param_groups", *(key for key in value if key not in ("state", "param_groups"))]
        return UnboundOptimizer(value, parts=(replace(part, keys=_unusual(list(value), usual)),))
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    part_of_group: list[int] = []
    extra: dict[str, Any] = {}
    done: list[OptimizerPart] = []
    for part, value in parts:
        with errors_at(key=str(part)):
            raw, listed = _NUMBERED[part.form](value)
            part = replace(part, listed=listed)
        first = sum(len(group["params"]) for group in groups)
        ids = {i: first + place for place, i in enumerate(raw.ids)}
        groups += [{**group, "params": [ids[i] for i in group["params"]]} for group in raw.groups]
        part_of_group += [len(done)] * len(raw.groups)
        state |= {ids[i]: slots for i, slots in raw.state.items()}
        if raw.extra:
            extra |= raw.extra if len(parts) == 1 else {part.label: raw.extra}
        done.append(replace(part, keys=_unusual(list(value), list(_in_form(part, raw)))))
    both = {"state": state, "param_groups": groups, **extra}
    return UnboundOptimizer(both, parts=tuple(done), part_of_group=tuple(part_of_group) if len(done) > 1 else ())


# An optimizer with numbered parameters, and `OptimizerPart.listed`.
_Numbered = tuple[RawOptimizer, tuple[str, str] | None]


def _from_numbered(value: dict[str, Any]) -> _Numbered:
    return RawOptimizer.parse(value), None


def _from_nested(value: dict[str, Any]) -> _Numbered:
    ids: dict[str, int] = {}
    for group in value["param_groups"]:
        for name in group["params"]:
            if name in ids:
                raise InconsistentError(f"lists {name} twice", key="param_groups")
            ids[name] = len(ids)
    groups = [{**group, "params": [ids[name] for name in group["params"]]} for group in value["param_groups"]]
    names = [group["params"] for group in value["param_groups"]]
    listed = _listed(names, [group.get("param_names") for group in groups])
    for group, own in zip(groups, names, strict=True):
        group["param_names"] = list(own)
    unknown = next((name for name in value["state"] if name not in ids), None)
    if unknown is not None:
        raise InconsistentError(f"has state for {unknown!r}, which is in no param group", key="state")
    state = {ids[name]: slots for name, slots in value["state"].items()}
    return RawOptimizer.parse({"state": state, "param_groups": groups}), listed


def _from_flattened(value: dict[str, Any]) -> _Numbered:
    """Number the parameters of a flattened optimizer.

    The parameters that share a list ``param_names`` are a group. Without such lists, each is a group of its own,
    because each has its own options in the file.
    """
    options: dict[str, dict[str, Any]] = {}
    for key, option in value.items():
        if key.startswith(_GROUPS):
            name, _, what = key.removeprefix(_GROUPS).rpartition(".")
            options.setdefault(name, {})[what] = option
    state: dict[str, dict[str, Any]] = {}
    for key, slot_value in value.items():
        if key.startswith(_STATE):
            path = key.removeprefix(_STATE)
            ends = (end for end in range(len(path) - 1, 0, -1) if path[end] == "." and path[:end] in options)
            end = next(ends, None)
            if end is None:
                raise InconsistentError("is state of a parameter that is in no param group", key=key)
            state.setdefault(path[:end], {})[path[end + 1 :]] = slot_value
    members: dict[Any, list[str]] = {}
    for name, own in options.items():
        together = own.get("param_names")
        members.setdefault(tuple(together) if isinstance(together, list) else name, []).append(name)
    for names in members.values():
        for name in names[1:]:
            if next(differences(options[names[0]], options[name]), None) is not None:
                raise InconsistentError("has other options than the parameters in the same group", key=name)
    groups_of_names = [_in_order_of(options[own[0]].get("param_names"), own) for own in members.values()]
    listed = _listed(groups_of_names, [options[own[0]].get("param_names") for own in groups_of_names])
    ids = {name: i for i, name in enumerate(name for own in groups_of_names for name in own)}
    groups = [
        {**options[own[0]], "params": [ids[name] for name in own], "param_names": list(own)} for own in groups_of_names
    ]
    numbered = {ids[name]: slots for name, slots in state.items()}
    return RawOptimizer.parse({"state": numbered, "param_groups": groups}), listed


_NUMBERED = {
    OptimizerForm.NUMBERED: _from_numbered,
    OptimizerForm.NESTED: _from_nested,
    OptimizerForm.FLATTENED: _from_flattened,
}


def _in_order_of(param_names: Any, names: list[str]) -> list[str]:
    """Return the names of a group in the order of ``param_names``, which may have another prefix."""
    if not isinstance(param_names, list) or len(param_names) != len(names):
        return names
    places = {name: i for i, name in enumerate(param_names)}
    pairs = zip(sorted(names), sorted(param_names), strict=True)
    return [name for name, _ in sorted(pairs, key=lambda pair: places[pair[1]])]


def _listed(names: Sequence[Sequence[str]], param_names: Sequence[Any]) -> tuple[str, str] | None:
    """Return what is before the names of ``param_names`` instead of what is before the names in the file.

    Args:
        names: the names of each group, by which the file identifies parameters.
        param_names: the value of ``param_names`` of each group, or None.

    Raises:
        InconsistentError: ``param_names`` have other names, or another order.
    """
    pairs = [(own, listed) for own, listed in zip(names, param_names, strict=True) if listed is not None]
    if not pairs:
        return None
    own, listed = ([name for pair in pairs for name in pair[side]] for side in (0, 1))
    if len(pairs) == len(names) and len(own) == len(listed) and all(isinstance(name, str) for name in listed):
        if not own:
            return "", ""
        first, other = own[0], listed[0]
        same = 0
        while same < min(len(first), len(other)) and first[-1 - same] == other[-1 - same]:
            same += 1
        theirs, ours = other[: len(other) - same], first[: len(first) - same]
        if all(name.startswith(ours) and theirs + name[len(ours) :] == o for name, o in zip(own, listed, strict=True)):
            return theirs, ours
    raise InconsistentError("its param_names contradict the names of its parameters", key="param_names")


def _unusual(keys: list[str], usual: list[str]) -> tuple[str, ...]:
    if not all(isinstance(key, str) for key in keys):
        raise InconsistentError("the keys of an optimizer's state dict must be text", key="optimizer")
    return () if keys == usual else tuple(keys)


# --- write ---


def with_optimizers(entries: Mapping[str, Any], optimizer: Optimizer | None, key: str | None) -> dict[str, Any]:
    """Return the entries of a payload with the optimizers in their places.

    Args:
        entries: the entries of the payload with references. None is in the places of the optimizers.
        optimizer: the optimizers.
        key: the usual key of an optimizer in the payload. It gets None if there is no optimizer for it.
    """
    result = dict(entries)
    for part, value in _separate(as_unbound(optimizer)) if optimizer is not None else ():
        result = with_value_at(result, part.place or (key or "optim",), value)
    if key is not None:
        result.setdefault(key, None)
    return result


def _separate(unbound: UnboundOptimizer) -> Iterator[tuple[OptimizerPart, dict[str, Any]]]:
    """Yield each optimizer with its value in the payload."""
    groups, state = unbound.state_dict["param_groups"], unbound.state_dict["state"]
    extra = {key: value for key, value in unbound.state_dict.items() if key not in ("state", "param_groups")}
    whole = RawOptimizer(groups, state, {}, unbound.part_of_group or (0,) * len(groups))
    for number, part in enumerate(unbound.parts):
        own = extra if len(unbound.parts) == 1 else extra.get(part.label, {})
        value = _in_form(part, replace(whole.of_parts([number]), extra=own))
        if part.keys:
            places = {key: i for i, key in enumerate(part.keys)}
            value = {key: value[key] for key in sorted(value, key=lambda key: places.get(key, len(places)))}
        yield part, value


def _in_form(part: OptimizerPart, raw: RawOptimizer) -> dict[str, Any]:
    """Return an optimizer with numbered parameters in the form of a file, with its keys in the usual order."""
    ids = {i: place for place, i in enumerate(raw.ids)}
    if not part.is_by_name:
        groups = [{**group, "params": [ids[i] for i in group["params"]]} for group in raw.groups]
        return {"state": {ids[i]: slots for i, slots in raw.state.items()}, "param_groups": groups, **raw.extra}
    names = {i: name for group in raw.groups for i, name in zip(group["params"], group["param_names"], strict=True)}
    named = [_group_by_name(part, group) for group in raw.groups]
    if part.form is OptimizerForm.NESTED:
        return {"state": {names[i]: slots for i, slots in raw.state.items()}, "param_groups": named}
    flat = {f"{_STATE}{names[i]}.{slot}": value for i, slots in raw.state.items() for slot, value in slots.items()}
    for group in named:
        options = {key: value for key, value in group.items() if key != "params"}
        flat |= {f"{_GROUPS}{name}.{key}": value for name in group["params"] for key, value in options.items()}
    return flat


def _group_by_name(part: OptimizerPart, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group that lists names instead of ids in ``params``, and in ``param_names`` what the file has there."""
    names = group["param_names"]
    named = {**group, "params": list(names)}
    if part.listed is None:
        del named["param_names"]
    else:
        theirs, ours = part.listed
        named["param_names"] = [theirs + name.removeprefix(ours) for name in names]
    return named
