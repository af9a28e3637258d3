"""Read ``.pt`` files with torch, behind a run of the pickle with inert stubs: an oracle for the package's own reader.

``torch.load(weights_only=True)`` does not run code from a pickle, but it trusts sizes in it, and calls functions that
return uninitialised memory or allocate any amount of it. So the pickle is run first with each class and function
replaced by a stub. The run compares the size of each storage with the archive, and rejects what torch cannot handle
safely.
"""

from __future__ import annotations

import io
import pickle
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch

from vraxion_ckpt.checkpoint.plain_data import check_plain
from vraxion_ckpt.errors import CkptError, CorruptError, InconsistentError, LimitError, UnsafeError, UnsupportedError
from vraxion_ckpt.formats.torch_archive import Container, check_archive


class _Inert:
    """A stub for any class, function or object of a pickle; its methods do nothing."""

    def __call__(self, *_: Any) -> Any:
        return _Inert()

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, _: Any) -> None:
        _refuse_to_hash(key)

    def append(self, _: Any) -> None: ...
    def extend(self, _: Any) -> None: ...


def _refuse_to_hash(key: Any) -> None:
    # Hashing deeply nested tuples overflows the C stack, here and in torch.
    left, pending = 127, [key]
    while pending:
        inner = pending.pop()
        if isinstance(inner, tuple):
            left -= len(inner)
            pending += inner[:200]
        if left < 0:
            raise LimitError("has a large tuple as a key")


def _refuse_state(state: Any) -> None:
    # The state of an object may also be a list of key-value pairs, whose keys would be hashed.
    if not isinstance(state, _Dict):
        raise InconsistentError("attributes are not a dict")


@dataclass(frozen=True)
class _Named(_Inert):
    """A stub for a class or function with its full name."""

    name: str
    dry_run: DryRun

    def __call__(self, *args: Any) -> Any:
        return self.dry_run.call(self.name, args)


@dataclass(eq=False)
class _Dict(dict[Any, Any]):
    """A dict or OrderedDict in the pickle."""

    dry_run: DryRun
    hashes: set[int] = field(default_factory=set)

    def __setitem__(self, key: Any, value: Any) -> None:
        _refuse_to_hash(key)
        super().__setitem__(key, value)
        self.hashes.add(hash(key))
        if len(self) - len(self.hashes) > 1000:  # many more would take minutes, also with torch
            raise LimitError("has keys of the same hash")

    def __setstate__(self, state: Any) -> None:
        _refuse_state(state)
        self.dry_run.copy(state)


# Functions that torch allows, with what they return. It is not plain data, and calling them is not safe.
_NOT_PLAIN = {
    "torch._tensor._rebuild_from_type_v2": "a tensor subclass, or a tensor with attributes",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_parameter_with_state": "a parameter with attributes",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
}

# Bytes per element of the storage classes that torch writes. It writes newer dtypes as UntypedStorage.
_ITEMSIZES = {
    f"{name}Storage": size
    for size, names in {
        1: ("Untyped", "Bool", "Byte", "Char", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"),
        2: ("Half", "BFloat16", "Short"),
        4: ("Float", "Int", "QInt32"),
        8: ("Double", "Long", "ComplexFloat"),
        16: ("ComplexDouble",),
    }.items()
    for name in names
}


@dataclass(frozen=True)
class _StorageType:
    """A stub for a storage class."""

    name: str

    def __call__(self, *_: Any) -> NoReturn:
        raise _memory_from_elsewhere(self.name)

    @property
    def itemsize(self) -> int:
        if self.name not in _ITEMSIZES:
            raise pickle.UnpicklingError(f"unknown storage type {self.name!r}")
        return _ITEMSIZES[self.name]


def _memory_from_elsewhere(name: str) -> UnsafeError:
    return UnsafeError(f"its pickle would call {name}, which returns memory that is not in the file")


# The opcodes that torch's unpickler accepts: most of protocol 2. Some others allocate or hash without limit.
_OPCODES = {
    code[0]
    for code in (
        *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD),
        *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2),
        *(pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.BINPERSID),
        *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET),
        *(pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS),
        *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT),
    )
}


class DryRun(pickle._Unpickler):  # in pure Python: the C one allocates memory for any memo index
    """An unpickler that replaces each class and function by a stub.

    `load` raises a `SourceError` if the pickle is not safe or not supported, and any exception if it is damaged.

    Args:
        data: the pickle.
        container: the archive that holds it.
    """

    stack: list[Any]

    def __init__(self, data: bytes, container: Container) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._container = container
        # In a pickle that torch.save wrote, calls copy each value at most once.
        self._copies_left = 1000 + 4 * len(data)

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _StorageType(name)
        return _Named(f"{module}.{name}", self)

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        if name in _NOT_PLAIN:
            raise UnsupportedError(f"holds {_NOT_PLAIN[name]}; only plain data can be carried")
        if name.startswith("torch.") and name.endswith(("Tensor", "Storage")):
            raise _memory_from_elsewhere(name)
        for arg in args:
            self.copy(arg)
        if name == "collections.OrderedDict":
            if args:
                raise pickle.UnpicklingError("an OrderedDict with arguments")
            return _Dict(self)
        if name in ("builtins.set", "collections.Counter"):
            for key in (key for arg in args if isinstance(arg, list | tuple) for key in arg):
                _refuse_to_hash(key)
        if name == "_codecs.encode" and len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
            return args[0].encode("latin1")
        # bytearray(n) allocates n bytes; some text encodings take hours for a megabyte.
        if name == "_codecs.encode" or (name == "builtins.bytearray" and not all(type(arg) is bytes for arg in args)):
            raise UnsafeError(f"its pickle would call {name} with arguments other than bytes")
        return _Inert()

    def copy(self, value: Any) -> None:
        """Count the values that a call copies, because many calls may each copy the same long list."""
        self._copies_left -= len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1
        if self._copies_left < 0:
            raise LimitError("its pickle copies far more data than it has")

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("a persistent id that is not a storage")
        _, kind, key, _, count = pid
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or type(count) is not int:
            raise pickle.UnpicklingError("a damaged storage reference")
        member, path = self._container.storages.get(key), self._container.path
        if member is None:
            raise CorruptError("a tensor's storage is missing", path=path, key=f"data/{key}")
        size = member.size
        if size != count * kind.itemsize:
            message = f"a tensor asks for {count * kind.itemsize} bytes, but its storage has {size}"
            raise CorruptError(message, path=path, key=f"data/{key}")
        return _Inert()

    def _empty_dict(self) -> None:
        self.stack.append(_Dict(self))

    def _new_object(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.stack[-1](*args)

    def _other_opcode(self) -> None:
        raise UnsupportedError("its pickle has opcodes that torch.save does not write by default")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **dict.fromkeys(pickle._Unpickler.dispatch, _other_opcode),
        **{code: run for code, run in pickle._Unpickler.dispatch.items() if code in _OPCODES},
        pickle.EMPTY_DICT[0]: _empty_dict,
        pickle.NEWOBJ[0]: _new_object,
    }


def load_with_torch(path: Path) -> Any:
    """Return the plain data of a ``.pt`` file with torch's tensors.

    Raises:
        CkptError: the file is damaged, unsafe or not supported.
    """
    container = check_archive(path)
    try:
        DryRun(container.pickled, container).load()
    except CkptError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptError(f"its pickle is damaged: {error!r}", path=path) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True)  # copies, so that all memory is aligned
    except pickle.UnpicklingError as error:
        raise UnsafeError(f"torch rejects its pickle: {error}", path=path) from error
    except Exception as error:
        raise CorruptError(f"torch cannot read it: {error!r}", path=path) from error
    check_plain(value, path)
    return value
