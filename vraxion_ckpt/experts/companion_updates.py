"""Let what belongs to the head follow a change of it: averages, master copies, lists.

Where names or places are known, entries are renamed, copied and removed as the head's tensors were. Where they are
not, the chain is refused and the key named, unless the user says what to do (`CompanionPolicy`).
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.head import Head
from vraxion_ckpt.checkpoint.head_names import split_name
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer
from vraxion_ckpt.checkpoint.order_rules import OrderKind, Rule, explains
from vraxion_ckpt.checkpoint.provenance import Ancestor
from vraxion_ckpt.errors import CkptWarning, TransformError
from vraxion_ckpt.experts.companions import Companion, find_companions, prefixes_of
from vraxion_ckpt.experts.surgery import copy_of, is_master_copy
from vraxion_ckpt.optimizer.parameter_order import order_of
from vraxion_ckpt.wording import listed

CompanionPolicy = Literal["grow", "keep", "drop"]

_WAYS_OUT = (
    "pass --companions keep to carry it along unchanged, or --companions drop to leave it out; its loader must "
    "then cope with that"
)


def follow(before: Checkpoint, after: Checkpoint, policy: CompanionPolicy) -> Checkpoint:
    """Return `after` with everything that belongs to the head changed as a step has changed the head.

    Args:
        before: the checkpoint that the step was given.
        after: what it made of it; its optimizer's parameters are in their places.
        policy: ``grow`` lets them follow, ``keep`` leaves them as they are, ``drop`` takes them out.

    Raises:
        TransformError: one of them cannot follow.
    """
    after = _with_schedules(before, after)
    if before.head is None or after.head is None or not _head_has_changed(before, after):
        return after
    router_only = not _names_have_changed(before, after)
    found = [each for each in find_companions(before) if not router_only or each.has_router]
    if not found:
        return after
    if policy == "keep":
        _warn(f"carried along unchanged, as asked: {listed(found, 3)}")
        return after
    if policy == "drop":
        _warn(f"left out, as asked: {listed(found, 3)}")
        return _dropped(after, found)
    if not router_only and not after.ancestors and before.head.kind == after.head.kind:
        _refuse_unknown_origin(before, after, found[0])
    for each in found:
        if each.problem:
            raise TransformError(f"{each.problem}, so it cannot follow the head", key=str(each), hint=_WAYS_OUT)
    return _Follower(before, after).changed(found, router_only=router_only)


def _warn(message: str) -> None:
    warnings.warn(message, CkptWarning, stacklevel=4)


def _head_has_changed(before: Checkpoint, after: Checkpoint) -> bool:
    if _names_have_changed(before, after):
        return True
    old, new = before.router_map, after.router_map
    return old is not None and new is not None and old is not new and not same_bits(old, new)


def _names_have_changed(before: Checkpoint, after: Checkpoint) -> bool:
    assert before.head is not None
    assert after.head is not None
    return bool(after.ancestors) or prefixes_of(before.head) != prefixes_of(after.head)


def _refuse_unknown_origin(before: Checkpoint, after: Checkpoint, companion: Companion) -> None:
    assert before.head is not None
    assert after.head is not None
    new = [prefix for prefix in prefixes_of(after.head) if prefix not in prefixes_of(before.head)]
    if new:
        raise TransformError(
            f"belongs to the head, and the transform does not say what {new[0].removesuffix('.')} was made of",
            key=str(companion),
            hint=_WAYS_OUT,
        )


# What torch's learning-rate schedulers keep for each param group.
_PER_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "lr_lambdas", "base_momentums", "max_momentums")


def _with_schedules(before: Checkpoint, after: Checkpoint) -> Checkpoint:
    """Give the learning-rate schedulers in the payload an entry for each param group, where groups have changed."""
    old, new = before.optimizer, after.optimizer
    if old is None or new is None or len(old.groups) == len(new.groups):
        return after
    group_of = {name: number for number, group in enumerate(old.groups) for name in group.params}
    sources = [group_of.get(after.former_name(group.params[0])) if group.params else None for group in new.groups]

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            result = copy.copy(value)
            is_schedule = "base_lrs" in value or "_last_lr" in value
            for key, entry in value.items():
                is_list = is_schedule and key in _PER_GROUP and isinstance(entry, list | tuple)
                if not is_list or len(entry) != len(old.groups):
                    result[key] = changed(entry)
                    continue
                if None in sources:
                    message = "has an entry for each param group, and it is not known from which the new ones come"
                    raise TransformError(message, key=f"{key}", hint=_WAYS_OUT)
                result[key] = type(entry)([copy.deepcopy(entry[number]) for number in sources])
            return result
        if isinstance(value, list | tuple) and any(isinstance(entry, dict | list | tuple) for entry in value):
            return type(value)([changed(entry) for entry in value])
        return value

    after.payload = {key: changed(value) for key, value in after.payload.items()}
    return after


@dataclass(frozen=True)
class _Follower:
    """Changes what belongs to a head as a step has changed the head."""

    before: Checkpoint
    after: Checkpoint

    def changed(self, found: list[Companion], *, router_only: bool) -> Checkpoint:
        for each in found:
            if each.kind == "list":
                in_order = self._list if each.place[0] == "optimizer" else partial(self._list_in_models_order, each)
                self._put(each, in_order)
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
        for new in prefixes_of(after):
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

    def _list_in_models_order(self, companion: Companion, value: Any) -> Any:
        """Change a list in the payload; it must be in the model's order, whether or not it follows the optimizer's."""
        new = self.after.optimizer
        if new is not None and not explains(Rule(OrderKind.MODEL), new.params, order_of(self.after)):
            raise TransformError(
                "lists one tensor for each parameter, and whether in the order of the model or of the optimizer is not "
                "known",
                key=str(companion),
                hint=_WAYS_OUT,
            )
        _warn(f"{companion}: taken to have one tensor for each parameter, in the model's order; changed like it")
        return self._list(value)

    def _list(self, value: Any) -> Any:
        """Order a list with one entry for each parameter, perhaps in groups, as the optimizer is ordered now."""
        old, new = self.before.optimizer, self.after.optimizer
        if old is None or new is None:
            return value
        if isinstance(value[0], Tensor):
            return type(value)(self._arranged(value, old, new))
        flat = iter(self._arranged([entry for each in value for entry in each], old, new))
        return type(value)([[next(flat) for _ in group.params] for group in new.groups])

    def _arranged(self, value: Sequence[Tensor], old: Optimizer, new: Optimizer) -> list[Any]:
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
        return result


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
