"""Check at run time that the fields of a checkpoint have their annotated types.

Plugins return checkpoints, and Python does not enforce annotations. The annotations are read from the classes, so new
fields are checked without a change here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from vraxion_ckpt.checkpoint.head import Expert
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.plain_data import check_plain
from vraxion_ckpt.checkpoint.references import TensorRef, is_tensor
from vraxion_ckpt.checkpoint.source_files import Sources
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict, TensorDictField
from vraxion_ckpt.errors import CkptError

_PLAIN = (dict[str, Any], TensorDict[str, Any])  # written as they are, so they must be plain data
_SIMPLE: frozenset[type] = frozenset({int, float, str, bool, NoneType, TensorRef})  # types without contents to check


def wrong_type(value: object, expected: Any = Checkpoint, place: str = "") -> str | None:
    """Return a description of the first field that does not have its annotated type, or None if all do.

    Opens no expert. A closed expert is checked when it is opened, see `wrong_leaves`.

    Args:
        value: a checkpoint or another dataclass.
        expected: the annotated type.
        place: path of the value, used in the description.
    """
    return next(_faults(value, expected, place), None)


def wrong_leaves(leaves: object) -> str | None:
    """Return a description of the first fault in the tensors of a newly opened expert, or None."""
    if not isinstance(leaves, Mapping):
        return f"an expert's tensors are a {_kind(leaves)}, not a mapping"
    return next(_entry_faults(leaves, (str, TensorRef), "expert"), None)


def _faults(value: object, expected: Any, place: str) -> Iterator[str]:
    if type(value) in _simple_types(expected):
        return
    origin, arguments = get_origin(expected), get_args(expected)
    if expected is Any:
        return
    if origin in (UnionType, Union):
        found = [list(_faults(value, each, place)) for each in arguments if each is not NoneType]
        if not (value is None and NoneType in arguments) and all(found):
            yield from (
                found[0] if len(found) == 1 else [f"{place or 'it'} is a {_kind(value)}, not {_type_text(expected)}"]
            )
    elif expected is TensorRef:
        yield from _tensor_faults(value, place)
    elif not _is_instance(value, origin or expected):
        yield f"{place or 'it'} is a {_kind(value)}, not {_type_text(expected)}"
    elif expected in _PLAIN:
        yield from _plain_faults(value, place)
    elif origin is not None:
        yield from _entry_faults(value, arguments, place)
    elif expected is Expert:
        if isinstance(value, Expert) and value.is_open:
            yield from _entry_faults(value.as_stored(), (str, TensorRef), place)
    elif is_dataclass(expected) and isinstance(expected, type) and expected is not Sources:
        for name, kind in _declared(expected).items():
            yield from _faults(getattr(value, name, None), kind, f"{place}.{name}" if place else name)


@cache
def _simple_types(expected: Any) -> frozenset[type]:
    """Return the types whose values satisfy an annotation whatever they contain."""
    kinds = get_args(expected) if get_origin(expected) in (UnionType, Union) else (expected,)
    return frozenset(kind for kind in _SIMPLE if kind in kinds)


def _is_instance(value: object, kind: type) -> bool:
    """Return whether a value is an instance. Bools do not count as numbers, nor subclasses as classes of the model."""
    if kind in (int, float):
        return isinstance(value, kind) and not isinstance(value, bool)
    if is_dataclass(kind) or kind is Expert:
        return type(value) is kind
    return isinstance(value, kind)


def _entry_faults(value: Any, kinds: tuple[Any, ...], place: str) -> Iterator[str]:
    """Check the entries of a dict, list, set or tuple."""
    if isinstance(value, Mapping):
        entries = value.as_stored() if isinstance(value, TensorDict) else value
        if _all_right(entries, kinds[0]):
            if _all_right(entries.values(), kinds[1]):
                return
            if kinds[1] is Expert:
                entries = {key: entry for key, entry in entries.items() if type(entry) is not Expert or entry.is_open}
                entries = {key: entry for key, entry in entries.items() if not _is_right_expert(entry)}
            elif kinds[1] == dict[str, Any] and _are_plain_dicts(entries):
                return
        for key, entry in entries.items():
            yield from _faults(key, kinds[0], f"a key of {place}")
            yield from _faults(entry, kinds[1], f"{place}[{key!r}]")
    elif isinstance(value, tuple) and kinds[-1] is not Ellipsis:
        if len(value) != len(kinds):
            yield f"{place} has {len(value)} entries, not {len(kinds)}"
        for i, (entry, kind) in enumerate(zip(value, kinds, strict=False)):
            yield from _faults(entry, kind, f"{place}[{i}]")
    elif not _all_right(value, kinds[0]):
        for i, entry in enumerate(value):
            yield from _faults(entry, kinds[0], f"{place}[{i}]")


def _all_right(values: Collection[Any], expected: Any) -> bool:
    """Return whether all values certainly have a type. There may be thousands, so this looks at whole columns."""
    if expected in (Any, object):
        return True
    found = set(map(type, values))
    if found <= _simple_types(expected):
        return True
    if found != {expected}:
        return found == {dict} and get_origin(expected) is Mapping and not any(values)
    columns = _declared(expected).items() if isinstance(expected, type) and is_dataclass(expected) else ()
    return bool(columns) and all(_all_right([*map(attrgetter(name), values)], kind) for name, kind in columns)


def _is_right_expert(value: Any) -> bool:
    """Return whether a value is an open expert that has only references, at which nobody has looked."""
    if type(value) is not Expert:
        return False
    leaves = value.as_stored()
    return _all_right(leaves, str) and _all_right(leaves.values(), TensorRef)


def _are_plain_dicts(entries: Mapping[Any, Any]) -> bool:
    """Return whether all values are certainly plain dicts, such as the optimizer's state of each parameter."""
    if not {dict}.issuperset(map(type, entries.values())):
        return False
    try:
        check_plain([*entries.values()])  # at once, which is faster than one by one, and no less strict
    except CkptError:
        return False
    return True


def _tensor_faults(value: object, place: str) -> Iterator[str]:
    if is_tensor(value):
        yield from _plain_faults(value, place)  # dense, on the CPU, not a subclass
    else:
        yield f"{place} is a {_kind(value)}, not a tensor"


def _plain_faults(value: object, place: str) -> Iterator[str]:
    try:
        check_plain(value.as_stored() if isinstance(value, TensorDict) else value)
    except CkptError as error:
        yield f"{place}{f'.{error.key}' if error.key else ''} {error.message}"


@cache
def _declared(kind: type) -> dict[str, Any]:
    """Return the annotated type of each field of a dataclass, except fields that are functions."""
    hints = get_type_hints(kind, localns={"Tensor": TensorRef})
    held = {field.name: hints[field.name] for field in fields(kind) if get_origin(hints[field.name]) is not Callable}
    return {
        name: TensorDict[str, get_args(hint)[0]] if get_origin(hint) is TensorDictField else hint  # type: ignore[misc]
        for name, hint in held.items()
    }


def _kind(value: object) -> str:
    return type(value).__name__


def _type_text(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) and not get_args(kind) else re.sub(r"\b(\w+\.)+", "", str(kind))
    return text.replace("TensorDict", "dict").replace("TensorRef", "Tensor")  # as plugins see them
