"""What else names the tensors of the head, or lists one value for each parameter, and must follow it.

Averages of the model (EMA, SWA) hold the model's names under some prefix: in the payload, as
``torch.optim.swa_utils.AveragedModel`` is saved, or inside the state dict. Others keep a list with one tensor for each
parameter: master copies beside an optimizer's state, the ``shadow_params`` of an average. When a step renames, clones
or removes experts, these follow where names or places are known. Where they are not, the chain is refused and the key
named, unless the user says what to do (`CompanionPolicy`).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from vraxion_ckpt.compare import same_bits
from vraxion_ckpt.errors import CkptWarning, TransformError
from vraxion_ckpt.head_names import split_name
from vraxion_ckpt.model import Ancestor, Checkpoint, Head
from vraxion_ckpt.order_rules import OrderKind, Rule, explains
from vraxion_ckpt.parameter_order import model_order
from vraxion_ckpt.surgery import copy_of, is_master_copy

CompanionPolicy = Literal["grow", "keep", "drop"]

_WAYS_OUT = (
    "pass --companions keep to carry it along unchanged, or --companions drop to leave it out; whoever loads it must "
    "then cope with that"
)


@dataclass(frozen=True)
class Companion:
    """Something that belongs to the model's parameters and stands elsewhere.

    Attributes:
        place: the keys that lead to it, beginning with ``payload``, ``model`` or ``optimizer``.
        kind: ``names`` for a dict with the model's names under `prefix`; ``list`` for a list with one tensor for each
            parameter; ``optimizer`` for an optimizer's state under a key of its own; ``texts`` for a list of names.
        prefix: what stands before the model's names.
        problem: why it cannot follow, or empty.
        fits: whether it fits the head as that is now.
    """

    place: tuple[str | int, ...]
    kind: Literal["names", "list", "optimizer", "texts"]
    prefix: str = ""
    problem: str = ""
    fits: bool = True

    def __str__(self) -> str:
        keys = [str(key) for key in self.place if key != "payload"]
        return ".".join(keys) + (f" ({self.prefix}*)" if self.prefix else "")


def find(checkpoint: Checkpoint) -> list[Companion]:
    """Return everything in payload, optimizer and state dict that names the head's tensors, or lists parameters."""
    if checkpoint.head is None:
        return []
    finder = _Finder(checkpoint)
    found = list(finder.inside(checkpoint.payload, ("payload",)))
    if checkpoint.optimizer is not None:
        found += finder.inside(checkpoint.optimizer.extra, ("optimizer",))
    prefixes = finder.prefixes(checkpoint.core)
    found += [finder.of_names(checkpoint.core, ("model",), prefix) for prefix in prefixes]
    return found


def follow(before: Checkpoint, after: Checkpoint, policy: CompanionPolicy) -> Checkpoint:
    """Return `after` with everything that belongs to the head changed as a step has changed the head.

    Args:
        before: the checkpoint that the step was given.
        after: what it made of it; its optimizer's parameters are in their places.
        policy: ``grow`` lets them follow, ``keep`` leaves them as they are, ``drop`` takes them out.

    Raises:
        TransformError: one of them cannot follow.
    """
    if before.head is None or after.head is None or not _head_has_changed(before, after):
        return after
    router_only = not _names_have_changed(before, after)
    found = [each for each in find(before) if not router_only or (each.kind == "names")]
    if not found:
        return after
    if policy == "keep":
        _warn(f"carried along unchanged, as asked: {_listed(found)}")
        return after
    if policy == "drop":
        _warn(f"left out, as asked: {_listed(found)}")
        return _dropped(after, found)
    if not router_only and not after.ancestors and before.head.kind == after.head.kind:
        _refuse_unknown_origin(before, after, found[0])
    for each in found:
        if each.problem and not router_only:
            raise TransformError(f"{each.problem}, so it cannot follow the head", key=str(each), hint=_WAYS_OUT)
    return _Follower(before, after).changed(found, router_only=router_only)


def misfits(checkpoint: Checkpoint) -> Iterator[Companion]:
    """Yield what names the head's tensors and does not fit it: it has probably not followed an earlier change."""
    yield from (each for each in find(checkpoint) if not each.fits)


def _warn(message: str) -> None:
    warnings.warn(message, CkptWarning, stacklevel=4)


def _listed(found: list[Companion]) -> str:
    shown = ", ".join(map(str, found[:3]))
    return shown if len(found) <= 3 else f"{shown}, … ({len(found)} in all)"


def _head_has_changed(before: Checkpoint, after: Checkpoint) -> bool:
    if _names_have_changed(before, after):
        return True
    old, new = before.router_map, after.router_map
    return old is not None and new is not None and old is not new and not same_bits(old, new)


def _names_have_changed(before: Checkpoint, after: Checkpoint) -> bool:
    assert before.head is not None
    assert after.head is not None
    return bool(after.ancestors) or _prefixes(before.head) != _prefixes(after.head)


def _prefixes(head: Head) -> list[str]:
    return [head.prefix(i) for i in sorted({*head.experts, *head.deleted})]


def _refuse_unknown_origin(before: Checkpoint, after: Checkpoint, companion: Companion) -> None:
    assert before.head is not None
    assert after.head is not None
    new = [prefix for prefix in _prefixes(after.head) if prefix not in _prefixes(before.head)]
    if new:
        raise TransformError(
            f"belongs to the head, and the transform does not say what {new[0].removesuffix('.')} was made of",
            key=str(companion),
            hint=_WAYS_OUT,
        )


# --- find ---


class _Finder:
    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.head is not None
        self.checkpoint = checkpoint
        self.head = checkpoint.head
        names = self.head.names
        heads = "|".join(map(re.escape, (names.single, names.experts)))
        self._pattern = re.compile(rf"(.*?)(?:^|(?<=\.))({heads})(.+)", re.DOTALL)
        self._tensors = checkpoint.open_tensors()

    def inside(self, value: Any, place: tuple[str | int, ...]) -> Iterator[Companion]:
        """Yield what is found inside a plain value."""
        if isinstance(value, dict):
            if {"state", "param_groups"} <= value.keys():
                yield Companion(place, "optimizer", problem="is an optimizer's state under a key of its own")
                return
            prefixes = self.prefixes(value)
            yield from (self.of_names(value, place, prefix) for prefix in prefixes)
            for key, entry in value.items():
                if not prefixes or not isinstance(entry, Tensor):
                    yield from self.inside(entry, (*place, key))
        elif isinstance(value, list | tuple):
            if (found := self._of_list(value, place)) is not None:
                yield found
                return
            for i, entry in enumerate(value):
                if isinstance(entry, dict | list | tuple):
                    yield from self.inside(entry, (*place, i))

    def prefixes(self, entries: Mapping[Any, Any]) -> list[str]:
        """Return every prefix under which a dict names tensors of the head."""
        if entries is self.checkpoint.core:
            searched: Any = (key for key in entries if not key.startswith(self.head.names.router_map))
        else:
            searched = entries
        found: dict[str, None] = {}
        for key in searched:
            match = self._pattern.fullmatch(key) if isinstance(key, str) else None
            if match:
                found[match[1]] = None
        return list(found)

    def of_names(self, entries: Mapping[Any, Any], place: tuple[str | int, ...], prefix: str) -> Companion:
        """Judge a dict that names the head's tensors under a prefix."""
        named = {key[len(prefix) :] for key in entries if isinstance(key, str) and key.startswith(prefix)}
        in_head = {name for name in named if name.startswith((self.head.names.single, self.head.names.experts))}
        strange = sorted(name for name in in_head if not self._is_of_head(name))
        leaves = {found[1] for name in in_head if (found := split_name(name, self.head.names))}
        lacking = [
            prefix_of + leaf
            for prefix_of in (self.head.prefix(i) for i in self.head.experts)
            for leaf in leaves
            if prefix_of + leaf not in in_head and self._is_of_head(prefix_of + leaf)
        ]
        if place == ("model",) and not self._is_whole_copy(named):
            return Companion(place, "names", prefix, "names a head like the model's, but is no copy of all parameters")
        if strange:
            problem = f"names {prefix}{strange[0]}, which the model has not"
        elif lacking:
            problem = f"has no entry for {lacking[0]}"
        else:
            problem = self._misshapen(entries, prefix, in_head) or self._other_router(entries, prefix)
        return Companion(place, "names", prefix, problem, fits=not problem)

    def _is_of_head(self, name: str) -> bool:
        if name in self._tensors:
            return True
        found = split_name(name, self.head.names)
        return self.head.is_not_at_hand(name) and found is not None

    def _is_whole_copy(self, named: set[str]) -> bool:
        """Tell whether there is an entry for every parameter, as far as it is known which these are."""
        optimizer = self.checkpoint.optimizer
        names = self.checkpoint.param_names or (tuple(optimizer.params) if optimizer else ())
        if not names:
            first = {name.partition(".")[0] for name in named}
            names = tuple(
                name
                for name, tensor in self._tensors.items()
                if tensor.is_floating_point() and name.partition(".")[0] in first
            )
            return bool(names) and {name for name in names if name in named} == set(names)
        return named.issuperset(names)

    def _misshapen(self, entries: Mapping[Any, Any], prefix: str, names: set[str]) -> str:
        for name in sorted(names):
            value, tensor = entries[prefix + name], self._tensors.get(name)
            if isinstance(value, Tensor) and tensor is not None and value.shape != tensor.shape:
                return f"{prefix}{name} has the shape {list(value.shape)}, the model's {list(tensor.shape)}"
        return ""

    def _other_router(self, entries: Mapping[Any, Any], prefix: str) -> str:
        value, router = entries.get(prefix + self.head.names.router_map), self.checkpoint.router_map
        if isinstance(value, Tensor) and router is not None and not same_bits(value, router):
            return f"its {prefix}{self.head.names.router_map} is another than the model's"
        return ""

    def _of_list(self, value: list[Any] | tuple[Any, ...], place: tuple[str | int, ...]) -> Companion | None:
        """Judge a list that may have one entry for each parameter."""
        optimizer = self.checkpoint.optimizer
        if value and all(isinstance(entry, str) for entry in value):
            if any(entry in self._tensors and split_name(entry, self.head.names) for entry in value):
                return Companion(place, "texts", problem="lists names of the head's tensors")
            return None
        if len(value) < 2 or not all(isinstance(entry, Tensor) for entry in value):
            return None
        shapes = [tuple(entry.shape) for entry in value]
        if optimizer is None:
            problem = "may list one tensor for each parameter, and without an optimizer it is not known which"
            names = [n for n in self.checkpoint.param_names or () if n in self._tensors]
            alike = shapes == [tuple(self._tensors[name].shape) for name in names]
            return Companion(place, "list", problem=problem) if alike else None
        known = [tuple(self._tensors[name].shape) if name in self._tensors else None for name in optimizer.params]
        if len(shapes) != len(known):
            return None
        fits = all(b is None or a == b for a, b in zip(shapes, known, strict=True))
        if place[0] == "optimizer":
            problem = "" if fits else "lists as many tensors as there are parameters, of other shapes"
            return Companion(place, "list", problem=problem)
        if sorted(shapes) != sorted(shape if shape is not None else () for shape in known) and not fits:
            return None
        problem = ""
        if not fits or optimizer.undecided or not self._optimizer_is_in_models_order():
            problem = "lists one tensor for each parameter, and it is not known which is whose"
        return Companion(place, "list", problem=problem)

    def _optimizer_is_in_models_order(self) -> bool:
        """Tell whether the optimizer's order is the model's: then a list in either order is in both."""
        order, _ = model_order(self.checkpoint)
        params = self.checkpoint.optimizer.params if self.checkpoint.optimizer else []
        return order is not None and explains(Rule(OrderKind.MODEL), params, order)


# --- change ---


@dataclass(frozen=True)
class _Follower:
    """Changes what belongs to a head as a step has changed the head."""

    before: Checkpoint
    after: Checkpoint

    def changed(self, found: list[Companion], *, router_only: bool) -> Checkpoint:
        for each in found:
            if each.kind == "list":
                self._put(each, self._list)
            elif each.kind == "names" and router_only:
                self._put(each, partial(self._with_router, each.prefix))
            elif each.kind == "names":
                self._put(each, partial(self._names, each.prefix))
        return self.after

    def _put(self, companion: Companion, change: Callable[[Any], Any]) -> None:
        """Replace a value by a changed one, and copy the containers that lead there."""
        top, *keys = companion.place
        if top == "model":
            self._in_model(change, companion.prefix)
            return
        root: Any = self.after.payload if top == "payload" else self._extra()
        value = _at(root, keys)
        if value is _MISSING:
            return  # the step has taken it out itself
        new = _replaced(root, keys, change(value))
        if top == "payload":
            self.after.payload = new
        elif self.after.optimizer is not None:
            self.after.optimizer = replace(self.after.optimizer, extra=new)

    def _extra(self) -> dict[str, Any]:
        return self.after.optimizer.extra if self.after.optimizer else {}

    def _in_model(self, change: Callable[[Any], Any], prefix: str) -> None:
        """Change the copies inside the state dict, and the modules that its ``_metadata`` lists of them."""
        after, head = self.after, self.after.head
        assert head is not None
        core = list(after.core)
        ahead = len([name for name in core[: head.position] if name.startswith(prefix)])
        new = change(after.core)
        if ahead:
            after.head = replace(head, position=head.position + len(new) - len(core))
        after.core = new
        if after.metadata is not None:
            modules = {f"{module}.": value for module, value in after.metadata.items()}
            grown = self._names(prefix, modules, router=False)
            after.metadata = {module.removesuffix("."): value for module, value in grown.items()}

    def _names(self, prefix: str, entries: Mapping[Any, Any], *, router: bool = True) -> dict[Any, Any]:
        """Rename, copy and remove entries under a prefix as the head's tensors were; others stay in their places."""
        before, after = self.before.head, self.after.head
        assert before is not None
        assert after is not None
        by_prefix: dict[str, dict[str, Any]] = {}
        for key in entries:
            if owner := self._owner(key, prefix, before):
                by_prefix.setdefault(owner, {})[key[len(prefix) + len(owner) :]] = entries[key]
        made: dict[str, Any] = {}
        used: set[str] = set()
        for new in _prefixes(after):
            source = self.after.ancestors.get(new, Ancestor(new))
            for leaf, value in by_prefix.get(source.prefix, {}).items():
                again = source.prefix in used or bool(source.noise)
                made[prefix + new + leaf] = self._value(value, source, new, leaf) if again else value
            used.add(source.prefix)
        result: dict[Any, Any] = {}
        done = False
        for key, value in entries.items():
            if not self._owner(key, prefix, before):
                result[key] = value
            elif not done:
                result.update(made)
                done = True
        if isinstance(entries, OrderedDict):
            result = OrderedDict(result)
            vars(result).update(self._attributes(vars(entries), prefix))
        return self._with_router(prefix, result) if router else result

    def _attributes(self, attributes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Let the ``_metadata`` of a state dict in the payload follow, too."""
        new = dict(attributes)
        metadata = attributes.get("_metadata")
        if isinstance(metadata, dict):
            modules = {f"{module}.": value for module, value in metadata.items()}
            grown = self._names(prefix, modules, router=False)
            new["_metadata"] = type(metadata)((m.removesuffix("."), value) for m, value in grown.items())
        return new

    @staticmethod
    def _owner(key: Any, prefix: str, head: Head) -> str:
        """Return the prefix of the expert that a key names a tensor of; empty if none."""
        if not isinstance(key, str) or not key.startswith(prefix):
            return ""
        name = key[len(prefix) :]
        found = split_name(name, head.names) if not name.endswith(".") else split_name(f"{name}x", head.names)
        if found is None or not name.startswith(head.prefix(found[0])):
            return ""
        return head.prefix(found[0])

    def _with_router(self, prefix: str, entries: dict[Any, Any]) -> dict[Any, Any]:
        """Return the entries with the new router map, where theirs was the model's."""
        assert self.before.head is not None
        entries = copy.copy(entries)
        name = prefix + self.before.head.names.router_map
        old, new = self.before.router_map, self.after.router_map
        value = entries.get(name)
        if isinstance(value, Tensor) and old is not None and new is not None and same_bits(value, old):
            entries[name] = new.detach().clone()
        return entries

    def _value(self, value: Any, source: Ancestor, new: str, leaf: str) -> Any:
        """Return the value of a clone: its ancestor's, with the noise that the head's tensor was given."""
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        assert self.before.head is not None
        assert self.after.head is not None
        tensors, clones = self._head_tensor(self.before, source.prefix, leaf), self._head_tensor(self.after, new, leaf)
        if tensors is None or clones is None or same_bits(tensors, clones):
            return copy_of(value, (), leaf)
        if is_master_copy(value, "", tensors) or (value.dtype == tensors.dtype and same_bits(value, tensors)):
            return clones.detach().to(value.dtype, copy=True)
        return copy_of(value, source.noise, leaf)

    @staticmethod
    def _head_tensor(checkpoint: Checkpoint, prefix: str, leaf: str) -> Tensor | None:
        head = checkpoint.head
        found = split_name(prefix + leaf, head.names) if head else None
        expert = head.experts.get(found[0]) if head and found else None
        return expert.get(leaf) if expert is not None else None

    def _list(self, value: Any) -> Any:
        """Order a list with one entry for each parameter as the optimizer is ordered now."""
        old, new = self.before.optimizer, self.after.optimizer
        if old is None or new is None:
            return value
        entries = dict(zip(old.params, value, strict=True))
        result, used = [], set()
        for name in new.params:
            former = self.after.former_name(name)
            if former not in entries:
                raise TransformError(
                    f"lists one tensor for each parameter, and none is known for {name}", key=name, hint=_WAYS_OUT
                )
            entry = entries[former]
            found = split_name(name, self.before.head.names) if self.before.head else None
            prefix = name[: -len(found[1])] if found else ""
            source = self.after.ancestors.get(prefix, Ancestor(prefix))
            if former in used or source.noise:
                entry = self._value(entry, source, prefix, found[1] if found else "")
            used.add(former)
            result.append(entry)
        return type(value)(result)


_MISSING = object()


def _at(root: Any, keys: list[str | int]) -> Any:
    for key in keys:
        try:
            root = root[key]
        except (KeyError, IndexError, TypeError):
            return _MISSING
    return root


def _replaced(root: Any, keys: list[str | int], value: Any) -> Any:
    """Return a copy of nested containers in which one entry is another; the others are shared."""
    if not keys:
        return value
    first, rest = keys[0], keys[1:]
    inner = _replaced(root[first], rest, value)
    if isinstance(root, dict):
        new = copy.copy(root)
        new[first] = inner
        return new
    return type(root)([inner if i == first else entry for i, entry in enumerate(root)])


def _dropped(after: Checkpoint, found: list[Companion]) -> Checkpoint:
    """Take companions out, of the payload and an optimizer whole entries."""
    for each in found:
        if each.place[0] == "model":
            names = [name for name in after.core if name.startswith(each.prefix)]
            assert after.head is not None
            ahead = sum(name.startswith(each.prefix) for name in list(after.core)[: after.head.position])
            after.core = {name: tensor for name, tensor in after.core.items() if name not in set(names)}
            after.head = replace(after.head, position=after.head.position - ahead)
            module = each.prefix.removesuffix(".")
            if after.metadata is not None:
                after.metadata = {
                    name: value
                    for name, value in after.metadata.items()
                    if name != module and not name.startswith(each.prefix)
                }
        elif each.place[0] == "payload":
            after.payload = {key: value for key, value in after.payload.items() if key != each.place[1]}
        elif after.optimizer is not None:
            extra = {key: value for key, value in after.optimizer.extra.items() if key != each.place[1]}
            after.optimizer = replace(after.optimizer, extra=extra)
    return after
