"""Make plain data and tensor references from the pickle of a ``.pt`` file, without torch.

The opcodes are scanned first (`vraxion_ckpt.formats.pickle_scan`). Then Python's unpickler runs them. Instead of each
class or function it gets a stand-in (`vraxion_ckpt.formats.stand_ins`). Imports without torch.
"""

from __future__ import annotations

import gc
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from vraxion_ckpt.checkpoint.references import ITEMSIZES
from vraxion_ckpt.checkpoint.source_files import StoredBytes
from vraxion_ckpt.errors import CorruptError, UnsafeError
from vraxion_ckpt.formats.pickle_scan import PickleScan, current_name
from vraxion_ckpt.formats.stand_ins import StandIns, StandInStorage, StorageType

# Modules that a pickle may never use, even if the user allows it.
NEVER_ALLOWED = frozenset({"builtins", "nt", "os", "posix", "subprocess", "sys"})
_BUFFER = 2**17  # bytes


def read_pickle(data: bytes, storages: Mapping[str, StoredBytes], allowed: Mapping[str, Any]) -> Any:
    """Return the value of a pickle. Values that are not plain data are `NotPlain`, or instances of allowed classes.

    Args:
        data: the pickle.
        storages: the storages of the archive, by their keys.
        allowed: further classes and functions that the pickle may use, by their full names.

    Raises:
        UnsafeError: the pickle uses other classes or functions; the message lists them.
        SourceError: see `PickleScan.run` and `StandIns`.
        Exception: of any class, if the pickle is damaged.
    """
    stand_ins = StandIns(len(data))
    usable = {name: value for name, value in allowed.items() if name.split(".")[0] not in NEVER_ALLOWED}
    scan = PickleScan(data, stand_ins.find, usable)
    scan.run()
    if scan.unsafe:
        stand_ins.refuse_not_carried(scan.names)
        raise _unsafe(scan.unsafe, allowed)
    reader = _AllowingReader if allowed else _Reader
    with _uncollected():
        return reader(data, stand_ins, storages, usable).load()


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


def _unsafe(names: Collection[str], allowed: Collection[str]) -> UnsafeError:
    blocked = [name for name in sorted(names) if name in allowed]
    message = f"its pickle would call {', '.join(sorted(names))}"
    if blocked:
        message += f"; module {blocked[0].split('.')[0]} is blocked, even if the name is allowed"
    return UnsafeError(message, hint=_how_to_allow(sorted(names)))


def _how_to_allow(names: Sequence[str]) -> str:
    if any(name.split(".")[0] in NEVER_ALLOWED for name in names):
        return "it would run commands, which --allow-global cannot permit; do not load this file with any program"
    return "if you trust each of them: " + " ".join(f"--allow-global {name}" for name in names)


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
        self._stand_ins = stand_ins
        self._storages = storages
        self._allowed = allowed
        self._types: dict[str, StorageType] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = current_name(module, name)
        stand_in = self._stand_ins.find(full)
        return self._allowed[full] if stand_in is None else stand_in

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


class _AllowingReader(_Finder, pickle._Unpickler):
    """An unpickler that also calls what the user allows. It is written in Python, so it can check each call."""

    stack: list[Any]

    def _call(self) -> None:
        self._stand_ins.count(*self.stack[-1])
        pickle._Unpickler.load_reduce(self)  # type: ignore[attr-defined]

    def _new_object(self) -> None:
        self._stand_ins.count(*self.stack[-1])
        pickle._Unpickler.load_newobj(self)  # type: ignore[attr-defined]

    def _build(self) -> None:
        if type(self.stack[-2]) not in (OrderedDict, *self._allowed.values()):
            raise UnsafeError(f"its pickle changes the attributes of a {type(self.stack[-2]).__qualname__}")
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _new_object,
        pickle.BUILD[0]: _build,
    }
