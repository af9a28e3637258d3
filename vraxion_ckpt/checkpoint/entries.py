"""Find entries of nested plain values, and leave out those that the user names. Imports without torch.

An entry is spelled as messages and `inspect` print it: ``scheduler.milestones``, ``callbacks[0].best``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.plain_data import DEEPEST
from vraxion_ckpt.checkpoint.tensor_dict import SCALARS
from vraxion_ckpt.errors import UsageError
from vraxion_ckpt.wording import did_you_mean, listed

OPTION = "--drop-key"


@dataclass(frozen=True)
class Entry:
    """An entry of a nested value.

    Attributes:
        place: where it is; empty for the value itself.
        key: the innermost entry of a dict that holds it, or is it, which `without_entry` can leave out.
        value: the entry.
    """

    place: str
    key: str
    value: Any


def find_entries(value: Any, wanted: Callable[[Any], bool]) -> Iterator[Entry]:
    """Yield the entries for which `wanted` is true, in order. Containers that occur twice are searched once."""
    seen: dict[int, Any] = {}
    pending = [(Entry("", "", value), 0)]
    while pending:
        entry, depth = pending.pop()
        if type(entry.value) in SCALARS:
            continue
        if wanted(entry.value):
            yield entry
        elif id(entry.value) not in seen and depth <= DEEPEST:  # deeper ones are refused by `check_plain`
            seen[id(entry.value)] = entry.value
            inner = []
            for key, held in _items(entry.value):
                place = entry.place + _spelled(key, entry.value, first=not entry.place)
                inner.append((Entry(place, place if isinstance(entry.value, Mapping) else entry.key, held), depth + 1))
            pending += reversed(inner)


def without_entries(
    value: Any, keys: Iterable[str], wanted: Callable[[Any], bool] | None = None
) -> tuple[Any, list[str]]:
    """Return a value without some entries, and the keys of those.

    Args:
        value: the value. It is not changed.
        keys: the entries, as they are spelled. Those that do not exist are passed over.
        wanted: if given, only entries are left out for which, or for an entry of which, it is true. Keys that may mean
            several of these, or entries of a list, are passed over.

    Raises:
        UsageError: a key may mean several entries, or an entry of a list.
    """
    dropped = []
    for key in keys:
        found = list(_paths(value, key))
        if wanted is not None:
            found = [path for path in found if any(find_entries(_at(value, path), wanted))]
            if len(found) != 1 or not isinstance(_at(value, found[0][:-1]), dict):
                continue
        if len(found) > 1:
            raise UsageError(f"{OPTION} {key}: there are several entries of this name")
        if found:
            value = _without(value, found[0], key)
            dropped.append(key)
    return value, dropped


def refuse_missing(keys: Iterable[str], *checkpoints: Checkpoint) -> None:
    """Check that each key was left out of at least one of the checkpoints.

    Raises:
        UsageError: one was not, because there is no such entry in the payload.
    """
    for key in keys:
        if not any(key in checkpoint.origin.dropped for checkpoint in checkpoints):
            names = list(dict.fromkeys(str(name) for checkpoint in checkpoints for name in checkpoint.payload))
            hint = did_you_mean(key, names) or (f"there are {listed(names)}" if names else None)
            raise UsageError(
                f"{OPTION} {key}: the payload has no such entry", path=checkpoints[0].origin.path, hint=hint
            )


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        attributes = vars(value) if isinstance(value, OrderedDict) else {}
        return [*value.items(), *([("<attributes>", attributes)] if attributes else ())]
    return enumerate(value) if isinstance(value, list | tuple | set) else ()


def _spelled(key: Any, holder: Any, *, first: bool) -> str:
    if isinstance(key, int) and not isinstance(holder, set):
        return f"[{key}]"
    return str(key) if first else f".{key}"


def _paths(value: Any, text: str) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each entry that `text` may mean."""
    if not isinstance(value, dict | list | tuple):
        return
    for key, held in value.items() if isinstance(value, dict) else enumerate(value):
        for name in {str(key), f"[{key}]"} if isinstance(key, int) else {str(key)}:
            if text == name:
                yield (key,)
            elif name and text.startswith(name) and text[len(name)] in ".[":
                rest = text[len(name) :].removeprefix(".")
                yield from ((key, *path) for path in _paths(held, rest))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _without(value: Any, path: tuple[Any, ...], key: str) -> Any:
    """Return a copy of a value without the entry at a path. Only the containers on the path are copied."""
    first, *others = path
    if not others and not isinstance(value, dict):
        raise UsageError(f"{OPTION} {key}: is an entry of a {type(value).__name__}", hint="drop all of it")
    changed = [*value] if isinstance(value, tuple) else copy.copy(value)
    if others:
        changed[first] = _without(value[first], tuple(others), key)
    else:
        del changed[first]
    return tuple(changed) if isinstance(value, tuple) else changed
