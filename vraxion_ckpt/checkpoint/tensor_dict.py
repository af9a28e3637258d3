"""Dicts and nested values whose tensors are references until somebody looks at them. Imports without torch.

In the same way, a long list of floats that was read from a file is kept as an array, and other values of torch and
numpy are stand-ins (`vraxion_ckpt.checkpoint.foreign_values`).
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from copy import deepcopy
from typing import Any, Generic, Self, TypeVar

from vraxion_ckpt.checkpoint.foreign_values import FOREIGN, original_of, stand_in_of
from vraxion_ckpt.checkpoint.references import TensorRef, as_reference, is_tensor

K = TypeVar("K")
V = TypeVar("V")

# Types of values that contain nothing: those that JSON has, and others.
SCALARS: frozenset[type] = frozenset({str, int, float, bool, type(None)})
OTHER_SCALARS: frozenset[type] = frozenset({bytes, bytearray, complex}) | FOREIGN
_REFERENCES: frozenset[type] = frozenset({TensorRef})
_SCALARS_AND_REFERENCES: frozenset[type] = SCALARS | _REFERENCES
_LONG = 2**14  # entries of a list


class PackedFloats(array):  # type: ignore[type-arg]  # its type parameter exists from Python 3.12 on
    """The floats of a long list, with 8 bytes for each. A list takes 40."""


# Types of values that hold others. A `TensorDict` and an `OrderedDict` are dicts too.
_CONTAINERS = (dict, list, tuple, set)
_NESTED = (*_CONTAINERS, *FOREIGN, PackedFloats)


def referenced(value: Any) -> Any:
    """Return a value with a reference for each tensor, a stand-in for other values of torch and numpy, and plain dicts.

    There is a list for each packed one.

    Containers in which nothing is replaced are returned unchanged. Those that occur twice also do in the result.
    """
    return _Replacement(_reference, _SCALARS_AND_REFERENCES).of(value)


def resolved(value: Any) -> Any:
    """Return a value with a tensor for each reference, a value of torch or numpy for each stand-in, and plain lists.

    Containers in which nothing is replaced are returned unchanged. Those that occur twice also do in the result.
    """
    return _Replacement(_tensor, SCALARS).of(value)


def packed(value: Any) -> Any:
    """Return a value with `PackedFloats` for each long list of floats.

    Containers in which nothing is replaced are returned unchanged. Those that occur twice also do in the result.
    """
    return _Replacement(_packed_list, _SCALARS_AND_REFERENCES).of(value)


def replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a value with what `change` returns for each value that is no reference, scalar, dict, list or tuple.

    Containers in which nothing is replaced are returned unchanged. Those that occur twice also do in the result.
    """
    return _Replacement(change, _SCALARS_AND_REFERENCES).of(value)


def _reference(value: Any) -> Any:
    if isinstance(value, TensorDict):
        return value.references()
    return as_reference(value) if is_tensor(value) else stand_in_of(_unpacked(value))


def _tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, TensorRef) else original_of(_unpacked(value))


def _unpacked(value: Any) -> Any:
    return value.tolist() if type(value) is PackedFloats else value


def _packed_list(value: Any) -> Any:
    if type(value) is list and len(value) >= _LONG and {float}.issuperset(map(type, value)):
        return PackedFloats("d", value)
    return value


class _Replacement:
    """Replaces the values in a value that contain nothing, `TensorDict`s, sets and lists.

    Args:
        change: returns what to put in place of one of them, or the value itself.
        unchanged: types of values that stay as they are.
    """

    def __init__(self, change: Callable[[Any], Any], unchanged: frozenset[type]) -> None:
        self._change = change
        self._unchanged = unchanged
        self._done: dict[int, tuple[Any, Any]] = {}  # the values so far, by their ids, each with its replacement

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in self._unchanged:
            return value
        if kind is TensorRef:
            return self._change(value)
        if id(value) not in self._done:
            has_entries = isinstance(value, _CONTAINERS) and kind is not TensorDict and not _is_size(value)
            new = self._with_entries_replaced(value) if has_entries else self._change(value)
            self._done[id(value)] = value, new
        return self._done[id(value)][1]

    def _with_entries_replaced(self, value: Any) -> Any:
        new = self._entries_replaced(value)
        return self._change(new) if isinstance(new, set | list) else new

    def _entries_replaced(self, value: Any) -> Any:
        entries = value.values() if isinstance(value, dict) else value
        attributes = vars(value) if isinstance(value, OrderedDict) else {}
        keys = value if isinstance(value, dict) else ()
        if (
            not attributes
            and self._unchanged.issuperset(map(type, entries))
            and self._unchanged.issuperset(map(type, keys))
        ):
            return value
        before = [*keys, *entries, *attributes.values()]
        after = [self.of(entry) for entry in before]
        if all(one is other for one, other in zip(after, before, strict=True)):
            return value
        if isinstance(value, list | tuple | set):
            return after if isinstance(value, list) else type(value)(after)
        size = len(value)
        made = dict(zip(after[:size], after[size : 2 * size], strict=True))
        if isinstance(value, OrderedDict):
            ordered = OrderedDict(made)
            ordered.__dict__.update(zip(attributes, after[2 * size :], strict=True))
            return ordered
        return Counter(made) if isinstance(value, Counter) else made


def _is_size(value: Any) -> bool:
    """Return whether a value is a `torch.Size` or its stand-in, which are tuples, but not replaced by one."""
    return type(value) is not tuple and isinstance(value, tuple)


class _Nested:
    """A container or a stand-in in a `TensorDict`. It has references and packed lists until somebody looks at it.

    Copies of the dict share it, so all of them give the same container.
    """

    __slots__ = ("resolved", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.resolved: Any = None

    def look(self) -> Any:
        if self.resolved is None:
            self.resolved = resolved(self.value)
        return self.resolved

    def stored(self) -> Any:
        return self.value if self.resolved is None else self.resolved


def _reference_of(value: Any) -> Any:
    if type(value) is not _Nested:
        return referenced(value)
    stored = value.stored()
    known = _SCALARS_AND_REFERENCES.issuperset
    if type(stored) is dict and known(map(type, stored.values())) and known(map(type, stored)):
        return stored  # as nearly all slots of an optimizer, of which there may be thousands
    return referenced(stored)


class _Items(ItemsView[Any, Any]):
    def __reversed__(self) -> Iterator[tuple[Any, Any]]:
        return iter(list(self)[::-1])


class _Values(ValuesView[Any]):
    def __reversed__(self) -> Iterator[Any]:
        return iter(list(self)[::-1])


class TensorDict(dict[K, V]):
    """A dict of tensors, or of values that contain tensors. They are references until somebody looks at them.

    Indexing gives tensors, and assigning takes them. `references` returns the entries without making a tensor.
    """

    def __init__(self, entries: Mapping[K, Any] | Iterable[tuple[K, Any]] = ()) -> None:
        if isinstance(entries, TensorDict):
            super().__init__(dict.items(entries))
        else:
            super().__init__(entries)
            nested: Any = {k: _Nested(v) for k, v in dict.items(self) if isinstance(v, _NESTED)}
            super().update(nested)

    def references(self) -> dict[K, Any]:
        """Return the entries, in order, with a `TensorRef` for each tensor."""
        found: dict[K, Any] = dict(dict.items(self))
        if not _REFERENCES.issuperset(map(type, found.values())):
            for key, value in found.items():
                if type(value) is not TensorRef:
                    found[key] = _reference_of(value)
        return found

    def as_stored(self) -> dict[K, Any]:
        """Return the entries, in order, with tensors where somebody has looked, and references elsewhere.

        Long lists at which nobody has looked may be `PackedFloats`.
        """
        return {key: value.stored() if isinstance(value, _Nested) else value for key, value in dict.items(self)}

    def reference(self, key: K) -> Any:
        """Return one entry with a `TensorRef` for each tensor.

        Raises:
            KeyError: there is no such entry.
        """
        return _reference_of(dict.__getitem__(self, key))

    def __getitem__(self, key: K) -> V:
        stored: object = super().__getitem__(key)
        value: Any = stored
        if isinstance(stored, TensorRef):
            value = stored.tensor()
            super().__setitem__(key, value)
        elif isinstance(stored, _Nested):
            value = stored.look()
        return value  # type: ignore[no-any-return]

    def __setitem__(self, key: K, value: Any) -> None:
        stored: Any = _Nested(value) if isinstance(value, _NESTED) else value
        super().__setitem__(key, stored)

    # Everything else that returns values goes through `__getitem__`. Overriding `__iter__` also makes ``dict(x)`` and
    # ``{**x}`` use it.

    def __iter__(self) -> Iterator[K]:
        return iter(self.keys())

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - it would call itself

    def items(self) -> Any:
        return _Items(self)

    def values(self) -> Any:
        return _Values(self)

    def pop(self, key: Any, *default: Any) -> Any:
        if key not in self:
            return dict.pop(self, key, *default)
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[K, V]:
        if not self:
            return super().popitem()  # raises KeyError
        key = next(reversed(self))
        return key, self.pop(key)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *entries: Any, **more: Any) -> None:
        for key, value in dict(*entries, **more).items():
            self[key] = value

    def __ior__(self, entries: Any) -> Self:  # type: ignore[override]  # `|` gives a plain dict
        self.update(entries)
        return self

    def copy(self) -> TensorDict[K, V]:
        return TensorDict(self)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorDict[K, V]:
        return TensorDict(deepcopy(self.references(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle tensors in a class that ``torch.load(weights_only=True)`` accepts."""
        return OrderedDict, (), None, None, iter(self.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and dict(self) == dict(other)

    def __or__(self, other: Any) -> Any:
        return dict(self) | dict(other)

    def __repr__(self) -> str:
        return repr(dict(self))


class TensorDictField(Generic[V]):
    """A dataclass field that holds a `TensorDict`. A plain dict that is assigned to it becomes one."""

    def __init__(self, *, required: bool = True) -> None:
        """Declare a field. If it is not required, it is empty by default."""
        self._required = required
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> TensorDict[str, V]:
        if instance is not None:
            held: TensorDict[str, V] = instance.__dict__[self._name]
            return held
        if self._required:
            raise AttributeError(self._name)  # tells `dataclass` that there is no default
        default: Any = ()  # `dataclass` refuses mutable ones
        return default  # type: ignore[no-any-return]

    def __set__(self, instance: object, value: dict[str, V]) -> None:
        given: object = value
        if given == () or (isinstance(value, dict) and not isinstance(value, TensorDict)):
            value = TensorDict(value)
        instance.__dict__[self._name] = value
