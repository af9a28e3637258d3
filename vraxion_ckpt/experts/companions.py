"""What else names the tensors of the head, or lists one value for each parameter, and must follow it.

Averages of the model (EMA, SWA) hold the model's names under some prefix: in the payload, as
``torch.optim.swa_utils.AveragedModel`` is saved, or inside the state dict. Others keep a list with one tensor for each
parameter: master copies beside an optimizer's state, the ``shadow_params`` of an average. When a step renames, clones
or removes experts, these must follow (`vraxion_ckpt.experts.companion_updates`). Here they are found, and
judged whether they can.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.head import Head
from vraxion_ckpt.checkpoint.head_names import split_name
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.order_rules import OrderKind, Rule, explains
from vraxion_ckpt.checkpoint.plain_data import named_tensors
from vraxion_ckpt.optimizer.parameter_order import model_order


@dataclass(frozen=True)
class Companion:
    """Something that belongs to the model's parameters and stands elsewhere.

    Attributes:
        place: the keys that lead to it, beginning with ``payload``, ``model`` or ``optimizer``.
        kind: ``names`` for a dict with the model's names under `prefix`; ``list`` for a list with one tensor for each
            parameter, perhaps in one list for each param group; ``unknown`` for what cannot follow.
        prefix: what stands before the model's names.
        problem: why it cannot follow, or empty.
        fits: whether it fits the head as that is now.
        has_router: whether it has a router map of its own.
    """

    place: tuple[str | int, ...]
    kind: Literal["names", "list", "unknown"]
    prefix: str = ""
    problem: str = ""
    fits: bool = True
    has_router: bool = False

    def __str__(self) -> str:
        keys = [str(key) for key in self.place if key != "payload"]
        return ".".join(keys) + (f" ({self.prefix}*)" if self.prefix else "")


def find_companions(checkpoint: Checkpoint) -> list[Companion]:
    """Return everything in payload, optimizer and state dict that names the head's tensors, or lists parameters.

    What holds tensors with the shapes of the whole head, under whatever names or none, is taken for a copy of it that
    cannot follow. Opens the experts if there are tensors to compare with theirs.
    """
    if checkpoint.head is None:
        return []
    finder = _Finder(checkpoint)
    found = []
    for key, value in checkpoint.payload.items():
        found += finder.entry(value, ("payload", key))
    for key, value in (checkpoint.optimizer.extra if checkpoint.optimizer else {}).items():
        found += finder.entry(value, ("optimizer", key))
    prefixes = finder.prefixes(checkpoint.core)
    found += [finder.of_names(checkpoint.core, ("model",), prefix) for prefix in prefixes]
    return found + list(finder.respelt(checkpoint.core, prefixes))


def stale_companions(checkpoint: Checkpoint) -> Iterator[Companion]:
    """Yield what names the head's tensors and does not fit it: it has probably not followed an earlier change."""
    yield from (each for each in find_companions(checkpoint) if not each.fits)


def prefixes_of(head: Head) -> list[str]:
    """Return what stands before the leaf names of each expert, deleted ones included."""
    return [head.prefix(i) for i in sorted({*head.experts, *head.deleted})]


class _Finder:
    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.head is not None
        self.checkpoint = checkpoint
        self.head = checkpoint.head
        names = self.head.names
        heads = "|".join(map(re.escape, (names.single, names.experts)))
        self._pattern = re.compile(rf"(.*?)(?:^|(?<=\.))({heads})(.+)", re.DOTALL)
        self._tensors = checkpoint.open_tensors()

    def entry(self, value: Any, place: tuple[str | int, ...]) -> list[Companion]:
        """Return what is found in one entry of the payload or the optimizer."""
        found = list(self._inside(value, place))
        known = {id(t) for each in found for _, t in named_tensors(_at(value, each.place[len(place) :]))}
        rest = [t for _, t in named_tensors({"": value}) if t.is_floating_point() and id(t) not in known]
        if rest and (self._holds_head(rest) or any(self._is_flat(tensor) for tensor in rest)):
            problem = "holds tensors like those of the whole head, and it is not known which is which"
            found.append(Companion(place, "unknown", problem=problem))
        return found

    def _inside(self, value: Any, place: tuple[str | int, ...]) -> Iterator[Companion]:
        if isinstance(value, dict):
            if {"state", "param_groups"} <= value.keys():
                yield Companion(place, "unknown", problem="is an optimizer's state under a key of its own")
                return
            prefixes = self.prefixes(value)
            yield from (self.of_names(value, place, prefix) for prefix in prefixes)
            for key, entry in value.items():
                if not isinstance(entry, Tensor):
                    yield from self._inside(entry, (*place, key))
        elif isinstance(value, list | tuple):
            if (found := self._of_list(value, place)) is not None:
                yield found
                return
            for i, entry in enumerate(value):
                if isinstance(entry, dict | list | tuple):
                    yield from self._inside(entry, (*place, i))

    def _holds_head(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether there is a tensor of the shape of each tensor of the head."""
        return self._head_shapes <= Counter(tuple(tensor.shape) for tensor in tensors)

    def _is_flat(self, tensor: Tensor) -> bool:
        """Tell whether a vector has as many elements as the head's parameters, or all, have together."""
        return tensor.ndim == 1 and tensor.numel() in self._totals

    @cached_property
    def _head_shapes(self) -> Counter[tuple[int, ...]]:
        self.checkpoint.open_experts()
        experts = self.head.experts.values()
        return Counter(tuple(t.shape) for e in experts for t in e.values() if t.is_floating_point())

    @cached_property
    def _totals(self) -> set[int]:
        self.checkpoint.open_experts()
        tensors = self.checkpoint.open_tensors()
        params = self.checkpoint.optimizer.params if self.checkpoint.optimizer else ()
        lists = [
            [name for name in tensors if split_name(name, self.head.names)],
            [name for name, tensor in tensors.items() if tensor.is_floating_point()],
            [name for name in params if name in tensors],
        ]
        return {sum(tensors[name].numel() for name in names) for names in lists if len(names) > 1}

    def respelt(self, entries: Mapping[str, Any], known: Sequence[str]) -> Iterator[Companion]:
        """Yield copies inside the state dict whose names are the head's spelt in another way, without its dots."""
        names = self.head.names
        parts = {_letters(names.single), _letters(names.experts)}
        found: dict[str, str] = {}
        for name in entries:
            if not any(part in _letters(name) for part in parts) or any(name.startswith(p) and p for p in known):
                continue
            for mine in (mine for mine in self._tensors if split_name(mine, names)):
                if name != mine and _letters(name).endswith(_letters(mine)):
                    found.setdefault(name[: _start_of(_letters(mine), name)], name)
        for prefix, name in found.items():
            problem = f"has {name}, which looks like a copy of a tensor of the head under another name"
            yield Companion(("model",), "unknown", prefix, problem)

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
        if place == ("model",) and not self._is_whole_copy(named, prefix):
            return Companion(place, "names", prefix, "names a head like the model's, but is no copy of all parameters")
        flattened = [name for name in strange if any(name.startswith(f"{known}.") for known in self._tensors)]
        if flattened:
            problem = f"has parts of parameters under names of their own, such as {prefix}{flattened[0]}"
        elif strange:
            problem = f"names {prefix}{strange[0]}, which the model has not"
        elif lacking:
            problem = f"has no entry for {lacking[0]}"
        else:
            problem = self._misshapen(entries, prefix, in_head) or self._other_router(entries, prefix)
        has_router = prefix + self.head.names.router_map in entries
        return Companion(place, "names", prefix, problem, fits=not problem, has_router=has_router)

    def _is_of_head(self, name: str) -> bool:
        if name in self._tensors:
            return True
        found = split_name(name, self.head.names)
        return self.head.is_not_loaded(name) and found is not None

    def _is_whole_copy(self, named: set[str], prefix: str) -> bool:
        """Tell whether there is an entry for every parameter, as far as it is known which these are."""
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
        if value and all(isinstance(entry, str) for entry in value):
            if any(entry in self._tensors and split_name(entry, self.head.names) for entry in value):
                return Companion(place, "unknown", problem="lists names of the head's tensors")
            return None
        optimizer = self.checkpoint.optimizer
        if optimizer is None or optimizer.undecided:
            return None
        if place[0] == "optimizer":
            sizes = [len(group.params) for group in optimizer.groups]
            in_groups = [len(each) if isinstance(each, list | tuple) else -1 for each in value] == sizes
            flat = [entry for each in value for entry in each] if in_groups else value
            return Companion(place, "list") if self._fits_parameters(flat, optimizer.params) else None
        if self._fits_parameters(value, optimizer.params) and self._optimizer_is_in_models_order():
            return Companion(place, "list")
        return None

    def _fits_parameters(self, value: Sequence[Any], names: Sequence[str]) -> bool:
        """Tell whether a list has a tensor of the shape of each parameter, in the order of the names."""
        return len(value) == len(names) > 1 and all(
            isinstance(entry, Tensor) and (name not in self._tensors or entry.shape == self._tensors[name].shape)
            for entry, name in zip(value, names, strict=True)
        )

    def _optimizer_is_in_models_order(self) -> bool:
        """Tell whether the optimizer's order is the model's: then a list in either order is in both."""
        order, _ = model_order(self.checkpoint)
        params = self.checkpoint.optimizer.params if self.checkpoint.optimizer else []
        return order is not None and explains(Rule(OrderKind.MODEL), params, order)


def _at(root: Any, keys: Sequence[str | int]) -> Any:
    """Return what the keys of a companion found inside `root` lead to."""
    for key in keys:
        root = root[key]
    return {"": root}


def _letters(name: str) -> str:
    return re.sub(r"[^0-9a-zA-Z]", "", name)


def _start_of(letters: str, name: str) -> int:
    """Return where in a name the part begins that has these letters, its last ones."""
    return next(i for i in range(len(name), -1, -1) if _letters(name[i:]) == letters)
