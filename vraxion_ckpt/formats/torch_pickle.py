"""Make plain data and tensor references from the pickle of a ``.pt`` file, without torch.

The opcodes are scanned first (`vraxion_ckpt.formats.pickle_scan`). Then Python's unpickler runs them. Instead of each
class or function it gets a stand-in (`vraxion_ckpt.formats.stand_ins`). What an unknown class or function would make is
`Unread`, and `read_pickle` tells their names, so that the caller refuses them or leaves them out.
Imports without torch.
"""

from __future__ import annotations

import gc
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from vraxion_ckpt.checkpoint.plain_data import NotPlain
from vraxion_ckpt.checkpoint.references import ITEMSIZES
from vraxion_ckpt.checkpoint.source_files import StoredBytes
from vraxion_ckpt.errors import CorruptError, UnsafeError, raise_if_out_of_memory
from vraxion_ckpt.formats.numpy_stand_ins import NUMPY_NAMES, WITH_STATE
from vraxion_ckpt.formats.pickle_scan import current_name, scan_pickle
from vraxion_ckpt.formats.stand_ins import KeyHashes, StandIns, StandInStorage, StorageType

# Modules that a pickle may never use, even if the user allows it. Its author wants to run a command.
NEVER_ALLOWED = frozenset(
    [
        *("_posixsubprocess", "builtins", "ctypes", "importlib", "nt", "os", "pickle", "posix", "pty", "runpy"),
        *("shutil", "socket", "subprocess", "sys"),
    ]
)
_HARMLESS_BUILTINS = frozenset(
    f"builtins.{name}"
    for name in ("bool", "dict", "float", "frozenset", "int", "list", "object", "range", "slice", "str", "tuple")
)
_BUFFER = 2**17  # bytes
_MOST_UNCHECKED = 10_000  # odd keys; storing as many that have the same hash takes a second


class Unread(NotPlain):
    """A stand-in for an object of an unknown class. The pickle may do anything to it, and nothing may look at it."""

    name: ClassVar[str]

    def __new__(cls, *_: Any) -> Unread:
        made = object.__new__(cls)
        vars(made)["description"] = f"is a {cls.name}"
        return made

    def __init__(self, *_: Any) -> None: ...
    def __call__(self, *_: Any) -> Unread:
        return self

    def __setitem__(self, key: Any, _: Any) -> None: ...
    def append(self, _: Any) -> None:
        """Ignore an entry."""

    extend = append
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def is_attack(name: str) -> bool:
    """Return whether the name of a class or function in a pickle shows that its author wants to run a command."""
    return name.split(".")[0] in NEVER_ALLOWED and name not in _HARMLESS_BUILTINS


def read_pickle(
    data: bytes, storages: Mapping[str, StoredBytes], allowed: Mapping[str, Any]
) -> tuple[Any, frozenset[str]]:
    """Return the value of a pickle, and the full names of what it uses and the user does not allow.

    Values that are not plain data are `NotPlain`, classes of them, or instances of allowed classes. If the pickle uses
    names that are not allowed, the value must not be used, except for parts without `Unread`.

    Args:
        data: the pickle.
        storages: the storages of the archive, by their keys.
        allowed: further classes and functions that the pickle may use, by their full names.

    Raises:
        UnsafeError: the pickle would run a command.
        SourceError: see `PickleScan.run` and `StandIns`.
        Exception: of any class, if the pickle is damaged.
    """
    stand_ins = StandIns(len(data))
    usable = {name: value for name, value in allowed.items() if name.split(".")[0] not in NEVER_ALLOWED}
    others = {name: value for name, value in usable.items() if name not in NUMPY_NAMES}
    scan = scan_pickle(data, lambda name: stand_ins.find(name) or stand_ins.numpy.get(name), WITH_STATE | others.keys())
    if attacks := sorted(filter(is_attack, scan.unknown)):
        raise _attack(attacks, allowed)
    checked = bool(others) or scan.odd_keys > _MOST_UNCHECKED
    with _uncollected():
        reader = (_CheckingReader if checked else _Reader)(data, stand_ins, storages, others)
        try:
            value = reader.load()
        except Exception as error:
            refused = (scan.unknown | reader.numpy_names) - usable.keys()
            raise_if_out_of_memory(error)
            if not refused:
                raise
            raise not_allowed(refused) from error
    return value, frozenset((scan.unknown | reader.numpy_names) - usable.keys())


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python from looking for unused cycles while many objects are made. All of them are used."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _attack(names: Collection[str], allowed: Collection[str]) -> UnsafeError:
    message = f"its pickle would call {', '.join(names)}"
    if blocked := [name for name in names if name in allowed]:
        message += f"; module {blocked[0].split('.')[0]} is blocked, even if the name is allowed"
    hint = "it would run commands, which --allow-global cannot permit; do not load this file with any program"
    return UnsafeError(message, hint=hint)


def not_allowed(names: Collection[str], key: str | None = None, hint: str | None = None) -> UnsafeError:
    """Return the error for a pickle that uses classes or functions that the user does not allow."""
    return UnsafeError(f"its pickle would call {', '.join(sorted(names))}", key=key, hint=hint)


class _Finder:
    """The methods of an unpickler that look up classes, functions and storages.

    Args:
        data: the pickle.
        stand_ins: the stand-ins for classes and functions.
        storages: the storages of the archive by their keys.
        allowed: classes and functions without a stand-in, by their full names.
    """

    def __init__(
        self, data: bytes, stand_ins: StandIns, storages: Mapping[str, StoredBytes], allowed: Mapping[str, Any]
    ) -> None:
        # A buffered reader can return bytes ahead, so the unpickler calls it only once for many opcodes.
        super().__init__(io.BufferedReader(io.BytesIO(data), _BUFFER), encoding="utf-8")  # type: ignore[call-arg]
        self.numpy_names: set[str] = set()
        """Full names of classes and functions of numpy that were looked up so far."""
        self._stand_ins = stand_ins
        self._storages = storages
        self._allowed = allowed
        self._unread: dict[str, type[Unread]] = {}
        self._types: dict[str, StorageType] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = current_name(module, name)
        found = self._stand_ins.find(full)
        if found is None and full in NUMPY_NAMES:
            self.numpy_names.add(full)
            found = self._stand_ins.numpy[full]
        if found is None:
            found = self._allowed.get(full)
        if found is None:
            if full not in self._unread:
                self._unread[full] = type("Unread", (Unread,), {"name": full})
            found = self._unread[full]
        return found

    def persistent_load(self, pid: Any) -> StandInStorage:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a persistent id that is not a storage")
        _, kind, key, _, count = pid
        if type(kind) is not StorageType or type(key) is not str or type(count) is not int:
            raise pickle.UnpicklingError("a damaged storage reference")
        stored, expected = self._storages.get(key), count * ITEMSIZES[kind.dtype]
        if stored is None:
            raise CorruptError("a tensor's storage is missing", key=f"data/{key}")
        if stored.nbytes != expected:
            message = f"a tensor asks for {expected} bytes, but its storage has {stored.nbytes}"
            raise CorruptError(message, key=f"data/{key}")
        if expected and self._types.setdefault(key, kind) is not kind:
            raise CorruptError("tensors of several dtypes share a storage", key=f"data/{key}")
        return StandInStorage(kind.dtype, stored)


class _Reader(_Finder, pickle.Unpickler):
    """An unpickler that makes stand-ins only."""


class _CheckingReader(_Finder, pickle._Unpickler):
    """An unpickler that also calls what the user allows, and looks at keys. It is written in Python, so it can."""

    stack: list[Any]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._hashes: dict[int, tuple[Any, KeyHashes]] = {}  # by the ids of the dicts, which this keeps in use

    def _call(self) -> None:
        self._stand_ins.count(*self.stack[-1])
        pickle._Unpickler.load_reduce(self)  # type: ignore[attr-defined]

    def _new_object(self) -> None:
        self._stand_ins.count(*self.stack[-1])
        pickle._Unpickler.load_newobj(self)  # type: ignore[attr-defined]

    def _build(self) -> None:
        target = self.stack[-2]
        if not isinstance(target, NotPlain) and type(target) not in (OrderedDict, *self._allowed.values()):
            raise UnsafeError(f"its pickle changes the attributes of a {type(target).__qualname__}")
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    def _set_item(self) -> None:
        self._note(self.stack[-3], self.stack[-2:-1])
        pickle._Unpickler.load_setitem(self)  # type: ignore[attr-defined]

    def _set_items(self) -> None:
        self._note(self.metastack[-1][-1], self.stack[::2])  # type: ignore[attr-defined]
        pickle._Unpickler.load_setitems(self)  # type: ignore[attr-defined]

    def _note(self, target: Any, keys: list[Any]) -> None:
        self._hashes.setdefault(id(target), (target, KeyHashes()))[1].add(keys)

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _new_object,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
    }
