"""Apply a change of the head to its companions: averages, master copies and lists.

See `vraxion_ckpt.experts.companions` for what companions are.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.head import Head
from vraxion_ckpt.checkpoint.head_names import split_name
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer
from vraxion_ckpt.checkpoint.order_rules import OrderKind, Rule, explains
from vraxion_ckpt.checkpoint.places import MISSING, value_at, with_value_at
from vraxion_ckpt.checkpoint.provenance import Ancestor
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict, referenced
from vraxion_ckpt.errors import CkptWarning, TransformError
from vraxion_ckpt.experts.companions import COMPANION_HINT, Companion, prefixes_of
from vraxion_ckpt.experts.noise import copy_of
from vraxion_ckpt.experts.optimizer_clones import in_dtype, is_master_copy
from vraxion_ckpt.optimizer.parameter_order import order_of


def grown(before: Checkpoint, after: Checkpoint, found: list[Companion], *, router_only: bool) -> Checkpoint:
    """Return `after` with its companions changed in the same way as the step has changed the head.

    Args:
        before: the checkpoint before the step.
        after: the checkpoint after the step.
        found: the companions of `before`. Each has an empty `problem`.
        router_only: whether only the router map has changed.

    Raises:
        TransformError: the order of a list with one tensor for each parameter, or the source of an entry, is unknown.
    """
    assert before.head is not None
    return _Growth(before, after, before.head).changed(found, router_only=router_only)


@dataclass(frozen=True)
class _Growth:
    before: Checkpoint
    after: Checkpoint
    head: Head  # before the step

    def changed(self, found: list[Companion], *, router_only: bool) -> Checkpoint:
        for each in found:
            if each.kind == "list":
                of_optimizer = each.place[0] == "optimizer"
                self._put(each, partial(self._list if of_optimizer else self._list_in_models_order, each))
            elif each.kind == "names" and router_only:
                self._put(each, partial(self._with_router, each.prefix))
            elif each.kind == "names":
                self._put(each, partial(self._names, each.prefix))
        return self.after

    def _put(self, companion: Companion, change: Callable[[Any], Any]) -> None:
        """Replace a companion by its changed value. Copy the containers on the path to it."""
        top, *keys = companion.place
        if top == "model":
            self._in_model(change, companion.prefix)
            return
        root = self.after.payload.as_stored() if top == "payload" else self._extra()
        value = referenced(value_at(root, keys))
        if value is MISSING:
            return  # the step has removed it
        new = with_value_at(root, keys, change(value))
        if top == "payload":
            self.after.payload = TensorDict(new)
        elif self.after.optimizer is not None:
            self.after.optimizer = replace(self.after.optimizer, extra=TensorDict(new))

    def _extra(self) -> dict[str, Any]:
        return self.after.optimizer.extra.references() if self.after.optimizer else {}

    def _in_model(self, change: Callable[[Any], Any], prefix: str) -> None:
        """Change a copy of the model inside the state dict, and the entries of its modules in ``_metadata``."""
        after, head = self.after, self.after.head
        assert head is not None
        core = list(after.core)
        ahead = len([name for name in core[: head.position] if name.startswith(prefix)])
        new = change(after.core.references())
        if ahead:
            after.head = replace(head, position=head.position + len(new) - len(core))
        after.core = TensorDict(new)
        if after.metadata is not None:
            after.metadata = self._modules(prefix, after.metadata)

    def _modules(self, prefix: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``_metadata`` with the modules under a prefix changed. A key is a prefix without its last dot."""
        changed = self._names(prefix, {f"{module}.": value for module, value in metadata.items()}, router=False)
        return {module.removesuffix("."): value for module, value in changed.items()}

    def _names(self, prefix: str, entries: Mapping[Any, Any], *, router: bool = True) -> dict[Any, Any]:
        """Rename, copy and remove the entries under a prefix like the head's tensors. Other entries stay in place."""
        assert self.after.head is not None
        by_prefix: dict[str, dict[str, Any]] = {}
        for key in entries:
            if owner := self._owner(key, prefix):
                leaf = self._in_model_names(key, prefix).removeprefix(owner)
                by_prefix.setdefault(owner, {})[leaf] = entries[key]
        made: dict[str, Any] = {}
        used: set[str] = set()
        for new in prefixes_of(self.after.head):
            source = self.after.ancestors.get(new, Ancestor(new))
            for leaf, value in by_prefix.get(source.prefix, {}).items():
                again = source.prefix in used or bool(source.noise)
                made[prefix + self.head.names.local(new) + leaf] = (
                    self._value(value, source, new, leaf) if again else value
                )
            used.add(source.prefix)
        result: dict[Any, Any] = {}
        done = False
        for key, value in entries.items():
            if not self._owner(key, prefix):
                result[key] = value
            elif not done:
                result.update(made)
                done = True
        if isinstance(entries, OrderedDict):
            result = OrderedDict(result)
            vars(result).update(self._attributes(vars(entries), prefix))
        return self._with_router(prefix, result) if router else result

    def _attributes(self, attributes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Return the attributes of a state dict in the payload, with its ``_metadata`` updated."""
        metadata = attributes.get("_metadata")
        if not isinstance(metadata, dict):
            return dict(attributes)
        return {**attributes, "_metadata": type(metadata)(self._modules(prefix, metadata))}

    def _owner(self, key: Any, prefix: str) -> str:
        """Return the prefix of the expert to which the tensor with this key belongs, or an empty string if to none."""
        if not isinstance(key, str) or not key.startswith(prefix):
            return ""
        name = self._in_model_names(key, prefix)
        found = split_name(f"{name}x" if name.endswith(".") else name, self.head.names)
        owner = self.head.prefix(found[0]) if found else ""
        return owner if name.startswith(owner) else ""

    def _in_model_names(self, key: str, prefix: str) -> str:
        """Return the model's name for an entry. The companion may stand below another prefix than the model."""
        return self.head.names.prefix + key.removeprefix(prefix)

    def _with_router(self, prefix: str, entries: dict[Any, Any]) -> dict[Any, Any]:
        """Return the entries. If they have a router map that equalled the model's, replace it by the new one."""
        entries = copy.copy(entries)
        name = prefix + self.head.names.local(self.head.names.router_map)
        old, new = self.before.router_reference, self.after.router_reference
        value = entries.get(name)
        if isinstance(value, TensorRef) and old is not None and new is not None and same_bits(value, old):
            entries[name] = new.copied()
        return entries

    def _value(self, value: Any, source: Ancestor, new: str, leaf: str) -> Any:
        """Return a copy of a value for a clone, with the noise that was added to the clone's tensor in the head."""
        if not isinstance(value, TensorRef):
            return copy.deepcopy(value)
        tensors, clones = self._head_tensor(self.before, source.prefix, leaf), self._head_tensor(self.after, new, leaf)
        if tensors is None or clones is None or same_bits(tensors, clones):
            return copy_of(value, (), leaf)
        if is_master_copy(value, "", tensors) or (value.dtype == tensors.dtype and same_bits(value, tensors)):
            return in_dtype(clones, value.dtype)
        return copy_of(value, source.noise, leaf)

    @staticmethod
    def _head_tensor(checkpoint: Checkpoint, prefix: str, leaf: str) -> TensorRef | None:
        head = checkpoint.head
        found = split_name(prefix + leaf, head.names) if head else None
        expert = head.experts.get(found[0]) if head and found else None
        return expert.references().get(leaf) if expert is not None else None

    def _list_in_models_order(self, companion: Companion, value: Any) -> Any:
        """Change a list in the payload, which must be in the model's order."""
        new = self.after.optimizer
        if new is not None and not explains(Rule(OrderKind.MODEL), new.params, order_of(self.after)):
            raise TransformError(
                "has one tensor for each parameter, but it is unknown whether they are in the order of the model or of "
                "the optimizer",
                key=str(companion),
                hint=COMPANION_HINT,
            )
        message = f"{companion}: assumed to have one tensor for each parameter in the model's order, and updated"
        warnings.warn(message, CkptWarning, stacklevel=4)
        return self._list(companion, value)

    def _list(self, companion: Companion, value: Any) -> Any:
        """Bring a list with an entry for each parameter, possibly nested by param group, into the optimizer's order."""
        old, new = self.before.optimizer, self.after.optimizer
        if old is None or new is None:
            return value
        if companion.part is not None:
            old, new = old.of_part(companion.part), new.of_part(companion.part)
        if isinstance(value[0], TensorRef):
            return type(value)(self._arranged(value, old, new))
        flat = iter(self._arranged([entry for each in value for entry in each], old, new))
        return type(value)([[next(flat) for _ in group.params] for group in new.groups])

    def _arranged(self, value: Sequence[TensorRef], old: Optimizer, new: Optimizer) -> list[Any]:
        entries = dict(zip(old.params, value, strict=True))
        result, used = [], set()
        for name in new.params:
            former = self.after.former_name(name)
            if former not in entries:
                raise TransformError(
                    "a list has one tensor for each parameter, but the source of this one is unknown",
                    key=name,
                    hint=COMPANION_HINT,
                )
            entry = entries[former]
            found = split_name(name, self.head.names)
            prefix = name[: -len(found[1])] if found else ""
            source = self.after.ancestors.get(prefix, Ancestor(prefix))
            if former in used or source.noise:
                entry = self._value(entry, source, prefix, found[1] if found else "")
            used.add(former)
            result.append(entry)
        return result
