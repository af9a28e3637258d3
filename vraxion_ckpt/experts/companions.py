"""Find the companions of the head: averages and copies of the model elsewhere in a checkpoint.

Averages of the model (EMA, SWA) contain the model's names under a prefix, in the payload (a saved
``torch.optim.swa_utils.AveragedModel``) or inside the state dict. Other companions are lists with one tensor for each
parameter, such as master copies stored with the optimizer, or ``shadow_params`` of an average. When a step renames,
clones or removes experts, `vraxion_ckpt.experts.companion_updates` updates the companions. This module finds them and
determines whether they can be updated.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.head import Head
from vraxion_ckpt.checkpoint.head_names import split_name
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.order_rules import OrderKind, Rule, explains
from vraxion_ckpt.checkpoint.places import value_at
from vraxion_ckpt.checkpoint.plain_data import named_references
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.tensor_dict import SCALARS
from vraxion_ckpt.optimizer.parameter_order import model_order

COMPANION_HINT = (
    "pass --companions keep to keep it unchanged, or --companions drop to remove it; then its loader must accept that"
)


@dataclass(frozen=True)
class Companion:
    """A value, such as a moving average, with an entry for each parameter. It must change when the head does.

    Attributes:
        place: the keys that lead to the value, beginning with ``payload``, ``model`` or ``optimizer``.
        kind: ``names`` for a dict with the model's names under `prefix`; ``list`` for a list with one tensor for each
            parameter, possibly nested by param group; ``unknown`` for a value that cannot be updated.
        prefix: what precedes the model's names in the keys of the dict, which lack the model's own prefix
            (`HeadNames.prefix`); a whole name if nothing precedes it.
        problem: the reason why the value cannot be updated, or empty.
        fits: whether the value's names and shapes fit the present head.
        has_router: whether the value contains a router map.
        part: the number of the optimizer to which the value belongs, or None if it belongs to the whole model.
    """

    place: tuple[str | int, ...]
    kind: Literal["names", "list", "unknown"]
    prefix: str = ""
    problem: str = ""
    fits: bool = True
    has_router: bool = False
    part: int | None = None

    def __str__(self) -> str:
        keys = [str(key) for key in self.place if key not in ("payload", "")]
        return ".".join(keys) + (f" ({self.prefix}*)" if self.prefix else "")


def find_companions(checkpoint: Checkpoint) -> list[Companion]:
    """Return all companions in payload, optimizer and state dict.

    Tensors with the shapes of the whole head under unknown names are reported as a copy that cannot be updated. Opens
    the experts if there are tensors that must be compared with the head's tensors.
    """
    if checkpoint.head is None:
        return []
    finder = _Finder(checkpoint)
    found = []
    for key, value in checkpoint.payload.references().items():
        found += finder.entry(value, ("payload", key))
    optimizer = checkpoint.optimizer
    for number, part in enumerate(optimizer.parts if optimizer else ()):
        assert optimizer is not None
        place = ("optimizer",) if len(optimizer.parts) == 1 else ("optimizer", part.label)
        for key, value in optimizer.extra_of(number).references().items():
            found += finder.entry(value, (*place, key), number)
    core = checkpoint.core.references()
    prefixes = finder.prefixes(name for name in core if not name.startswith(checkpoint.head.names.router_map))
    found += [finder.of_names(core, ("model",), prefix) for prefix in prefixes]
    return found + list(finder.other_names(core, prefixes))


def stale_companions(checkpoint: Checkpoint) -> Iterator[Companion]:
    """Yield companions that do not fit the head. They were probably not updated at an earlier change of the head."""
    yield from (each for each in find_companions(checkpoint) if not each.fits)


def prefixes_of(head: Head) -> list[str]:
    """Return the state-dict prefix of each expert, including deleted ones."""
    return [head.prefix(i) for i in sorted({*head.experts, *head.deleted})]


_NUMBERS = SCALARS - {str}  # lists of text may hold names of the head's tensors


class _Finder:
    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.head is not None
        self.checkpoint = checkpoint
        self.head = checkpoint.head
        heads = "|".join(
            map(
                re.escape,
                (self.head.names.local(self.head.names.single), self.head.names.local(self.head.names.experts)),
            )
        )
        self._pattern = re.compile(rf"(.*?)(?:^|(?<=\.))({heads})(.+)", re.DOTALL)
        self._tensors = checkpoint.open_references()

    def entry(self, value: Any, place: tuple[str | int, ...], part: int | None = None) -> list[Companion]:
        """Return the companions in one entry of the payload, or of the optimizer with this number."""
        found = list(self._inside(value, place, part))
        inside = [value_at(value, each.place[len(place) :]) for each in found]
        known = {id(t) for each in inside for _, t in named_references({"": each})}
        rest = [t for _, t in named_references({"": value}) if t.is_floating_point() and id(t) not in known]
        if rest and (self._holds_head(rest) or any(self._is_flat(tensor) for tensor in rest)):
            problem = "has tensors with the shapes of the whole head under unknown names"
            found.append(Companion(place, "unknown", problem=problem))
        return found

    def _inside(self, value: Any, place: tuple[str | int, ...], part: int | None) -> Iterator[Companion]:
        if isinstance(value, dict):
            if self._is_like_optimizer(value):
                yield Companion(place, "unknown", problem="is like the state of an optimizer, but in no known form")
                return
            prefixes = self.prefixes(value)
            yield from (self.of_names(value, place, prefix) for prefix in prefixes)
            for key, entry in value.items():
                if not isinstance(entry, TensorRef):
                    yield from self._inside(entry, (*place, key), part)
        elif isinstance(value, list | tuple):
            if _NUMBERS.issuperset(map(type, value)):
                return
            if (found := self._of_list(value, place, part)) is not None:
                yield found
                return
            for i, entry in enumerate(value):
                if isinstance(entry, dict | list | tuple):
                    yield from self._inside(entry, (*place, i), part)

    def _is_like_optimizer(self, value: Mapping[Any, Any]) -> bool:
        """Return whether a dict has some of the parts of an optimizer. Optimizers in known forms are not here."""
        groups, state = value.get("param_groups"), value.get("state")
        if "param_groups" in value and "state" in value:
            return True
        if isinstance(groups, list) and any(isinstance(group, dict) and "params" in group for group in groups):
            return True
        if isinstance(state, dict) and any(
            isinstance(slots, dict) and (type(key) is int or key in self._tensors) for key, slots in state.items()
        ):
            return True
        return any(isinstance(key, str) and key.startswith("param_groups.") for key in value)

    def _holds_head(self, tensors: Sequence[TensorRef]) -> bool:
        """Return whether the tensors include, for each tensor of the head, another one with its shape."""
        return self._head_shapes <= Counter(tensor.shape for tensor in tensors)

    def _is_flat(self, tensor: TensorRef) -> bool:
        """Return whether a tensor is a vector with as many elements as all parameters, or as the whole head."""
        return tensor.ndim == 1 and tensor.numel() in self._totals

    @cached_property
    def _head_shapes(self) -> Counter[tuple[int, ...]]:
        self.checkpoint.open_experts()
        experts = [expert.references() for expert in self.head.experts.values()]
        return Counter(t.shape for e in experts for t in e.values() if t.is_floating_point())

    @cached_property
    def _totals(self) -> set[int]:
        self.checkpoint.open_experts()
        tensors = self.checkpoint.open_references()
        params = self.checkpoint.optimizer.params if self.checkpoint.optimizer else ()
        lists = [
            [name for name in tensors if split_name(name, self.head.names)],
            [name for name, tensor in tensors.items() if tensor.is_floating_point()],
            [name for name in params if name in tensors],
        ]
        return {sum(tensors[name].numel() for name in names) for names in lists if len(names) > 1}

    def other_names(self, entries: Mapping[str, Any], known: Sequence[str]) -> Iterator[Companion]:
        """Yield copies of the head in the state dict. Their names end like the head's, apart from punctuation."""
        names = self.head.names
        parts = {_letters(self.head.names.local(names.single)), _letters(self.head.names.local(names.experts))}
        found: dict[str, str] = {}
        for name in entries:
            if not any(part in _letters(name) for part in parts) or any(name.startswith(p) and p for p in known):
                continue
            for mine in (self.head.names.local(mine) for mine in self._tensors if split_name(mine, names)):
                if name != mine and _letters(name).endswith(_letters(mine)):
                    found.setdefault(name[: _start_of(_letters(mine), name)] or name, name)
        for prefix, name in found.items():
            problem = f"has {name}, which seems to be a copy of a tensor of the head under another name"
            yield Companion(("model",), "unknown", prefix, problem)

    def prefixes(self, names: Iterable[Any]) -> list[str]:
        """Return every prefix with which some of the names are names of the head's tensors."""
        found: dict[str, None] = {}
        for key in names:
            match = self._pattern.fullmatch(key) if isinstance(key, str) else None
            if match:
                found[match[1]] = None
        return list(found)

    def of_names(self, entries: Mapping[Any, Any], place: tuple[str | int, ...], prefix: str) -> Companion:
        """Return the companion for a dict with the head's names under a prefix."""
        own = self.head.names.prefix
        named = {own + key[len(prefix) :] for key in entries if isinstance(key, str) and key.startswith(prefix)}
        in_head = {name for name in named if name.startswith((self.head.names.single, self.head.names.experts))}
        unknown = sorted(name for name in in_head if not self._is_of_head(name))
        leaves = {found[1] for name in in_head if (found := split_name(name, self.head.names))}
        lacking = [
            prefix_of + leaf
            for prefix_of in (self.head.prefix(i) for i in self.head.experts)
            for leaf in leaves
            if prefix_of + leaf not in in_head and self._is_of_head(prefix_of + leaf)
        ]
        if place == ("model",) and not self._is_whole_copy(named, prefix):
            return Companion(place, "names", prefix, "has the names of the head, but not of all parameters")
        flattened = [name for name in unknown if any(name.startswith(f"{known}.") for known in self._tensors)]
        if flattened:
            problem = (
                f"has parts of parameters as separate entries, such as {prefix}{self.head.names.local(flattened[0])}"
            )
        elif unknown:
            problem = f"has {prefix}{self.head.names.local(unknown[0])}, which the model does not have"
        elif lacking:
            problem = f"has no entry for {self.head.names.local(lacking[0])}"
        else:
            problem = self._misshapen(entries, prefix, named) or self._other_router(entries, prefix)
        has_router = prefix + self.head.names.local(self.head.names.router_map) in entries
        return Companion(place, "names", prefix, problem, fits=not problem, has_router=has_router)

    def _is_of_head(self, name: str) -> bool:
        if name in self._tensors:
            return True
        found = split_name(name, self.head.names)
        return self.head.is_not_loaded(name) and found is not None

    def _is_whole_copy(self, named: set[str], prefix: str) -> bool:
        """Return whether there is an entry for every known parameter of the model."""
        optimizer = self.checkpoint.optimizer
        names = self.checkpoint.param_names or (tuple(optimizer.params) if optimizer else ())
        names = tuple(name for name in names if not name.startswith(prefix))
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
            value, tensor = entries[prefix + self.head.names.local(name)], self._tensors.get(name)
            if isinstance(value, TensorRef) and tensor is not None and value.shape != tensor.shape:
                found = f"{prefix}{self.head.names.local(name)} has shape {list(value.shape)}"
                return f"{found}, but the model's tensor has {list(tensor.shape)}"
        return ""

    def _other_router(self, entries: Mapping[Any, Any], prefix: str) -> str:
        name = prefix + self.head.names.local(self.head.names.router_map)
        value, router = entries.get(name), self.checkpoint.router_reference
        if isinstance(value, TensorRef) and router is not None and not same_bits(value, router):
            return f"{name} differs from the model's router map"
        return ""

    def _of_list(
        self, value: list[Any] | tuple[Any, ...], place: tuple[str | int, ...], part: int | None
    ) -> Companion | None:
        """Return the companion for a list with one entry for each parameter, or None for any other list."""
        if value and all(isinstance(entry, str) for entry in value):
            if any(entry in self._tensors and split_name(entry, self.head.names) for entry in value):
                return Companion(place, "unknown", problem="is a list of names of the head's tensors")
            return None
        optimizer = self.checkpoint.optimizer
        if optimizer is None or optimizer.undecided:
            return None
        if part is not None:
            one = optimizer.of_part(part)
            sizes = [len(group.params) for group in one.groups]
            in_groups = [len(each) if isinstance(each, list | tuple) else -1 for each in value] == sizes
            flat = [entry for each in value for entry in each] if in_groups else value
            if not self._fits_parameters(flat, one.params):
                return None
            if one.parts[0].is_by_name:
                problem = "has one tensor for each parameter of an optimizer that is loaded by name, in unknown order"
                return Companion(place, "unknown", problem=problem)
            return Companion(place, "list", part=part)
        if self._fits_parameters(value, optimizer.params) and self._optimizer_is_in_models_order():
            return Companion(place, "list")
        several = optimizer.each_part() if len(optimizer.parts) > 1 else []
        for names in [*(one.params for one in several), *(group.params for group in optimizer.groups)]:
            if self._fits_parameters(value, names) and any(split_name(name, self.head.names) for name in names):
                problem = "may have one tensor for each parameter of one optimizer or param group"
                return Companion(place, "unknown", problem=problem)
        return None

    def _fits_parameters(self, value: Sequence[Any], names: Sequence[str]) -> bool:
        """Return whether a list has one tensor for each name, with the parameter's shape."""
        return len(value) == len(names) > 1 and all(
            isinstance(entry, TensorRef) and (name not in self._tensors or entry.shape == self._tensors[name].shape)
            for entry, name in zip(value, names, strict=True)
        )

    def _optimizer_is_in_models_order(self) -> bool:
        """Return whether the optimizer is in the model's order. If so, the order of a list is not ambiguous."""
        order, _ = model_order(self.checkpoint)
        params = self.checkpoint.optimizer.params if self.checkpoint.optimizer else []
        return order is not None and explains(Rule(OrderKind.MODEL), params, order)


def _letters(name: str) -> str:
    return re.sub(r"[^0-9a-zA-Z]", "", name)


def _start_of(letters: str, name: str) -> int:
    """Return the index in `name` from which on its letters and digits, without punctuation, are `letters`."""
    return next(i for i in range(len(name), -1, -1) if _letters(name[i:]) == letters)
