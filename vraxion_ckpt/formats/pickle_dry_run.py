"""What the pickle of a ``.pt`` asks for, found out before torch runs it.

``torch.load(weights_only=True)`` refuses code that a pickle brings along, but believes the sizes in it and calls
some functions that return memory from elsewhere or take as much of it as they are told. Here the pickle runs first
with every name replaced by something inert: each storage it asks for is compared with what the container holds,
and what torch would do wrongly is refused. Imports nothing of torch.
"""

from __future__ import annotations

import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from vraxion_ckpt.errors import CorruptError, InconsistentError, LimitError, UnsafeError, UnsupportedError
from vraxion_ckpt.formats.torch_archive import Container


class _Inert:
    """Stands for any class or function that a pickle names; does nothing, whatever is done to it."""

    def __call__(self, *_: Any) -> Any:
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        _refuse_to_hash_state(state)

    def __setitem__(self, key: Any, _: Any) -> None:
        _refuse_to_hash(key)

    def append(self, _: Any) -> None: ...
    def extend(self, _: Any) -> None: ...


def _refuse_to_hash(key: Any) -> None:
    # C hashes a tuple within a tuple within … until its stack overflows, here as in torch.
    if isinstance(key, tuple):
        raise InconsistentError("has a key of type tuple, not text")


def _refuse_to_hash_state(state: Any) -> None:
    # An object's state may also be spelt as pairs of a key and a value.
    for pair in state if isinstance(state, list | tuple) else ():
        if pair and isinstance(pair, list | tuple):
            _refuse_to_hash(pair[0])


@dataclass(frozen=True)
class _Named(_Inert):
    """A class or function, by its full name."""

    name: str
    rehearsal: DryRun

    def __call__(self, *args: Any) -> Any:
        return self.rehearsal.call(self.name, args)


@dataclass(eq=False)
class _Dict(dict[Any, Any]):
    """A dict or OrderedDict of the pickle."""

    rehearsal: DryRun

    def __setitem__(self, key: Any, value: Any) -> None:
        _refuse_to_hash(key)
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        _refuse_to_hash_state(state)
        self.rehearsal.copy(state)


# What torch calls of itself, although its result is refused below and making it reaches further than that check.
_NOT_PLAIN = {
    "torch._tensor._rebuild_from_type_v2": "a tensor subclass, or a tensor with attributes",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_parameter_with_state": "a parameter with attributes",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
}

# Bytes per element of the storage classes that torch writes; newer dtypes come as UntypedStorage.
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
    """The storage class that a persistent id names."""

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


# What torch's own unpickler takes: pickle's protocol 2, less a few. Some of the others take memory or hash at will.
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


class DryRun(pickle._Unpickler):  # the pure-Python one: C's allocates whatever a memo index asks for
    """Run a pickle with every name replaced by something inert, to see what it asks for.

    `load` raises a `CkptError` for what must not reach torch, and anything at all for a damaged pickle.
    """

    stack: list[Any]

    def __init__(self, data: bytes, container: Container) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._container = container
        # What torch.save writes copies only what stands in the pickle, and that once.
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
                raise pickle.UnpicklingError("an OrderedDict made of something")
            return _Dict(self)
        if name in ("builtins.set", "collections.Counter"):
            for key in (key for arg in args if isinstance(arg, list | tuple) for key in arg):
                _refuse_to_hash(key)
        if name == "_codecs.encode" and len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
            return args[0].encode("latin1")
        # Given a number, a bytearray takes that much memory; some text encodings take hours for a megabyte.
        if name == "_codecs.encode" or (name == "builtins.bytearray" and not all(type(arg) is bytes for arg in args)):
            raise UnsafeError(f"its pickle would call {name} for something else than bytes")
        return _Inert()

    def copy(self, value: Any) -> None:
        """Count what a call takes over: many calls may share one long list, each making a copy of it."""
        self._copies_left -= len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1
        if self._copies_left < 0:
            raise LimitError("its pickle copies far more than it holds")

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("a persistent id that is no storage")
        _, kind, key, _, count = pid
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or type(count) is not int:
            raise pickle.UnpicklingError("a damaged storage reference")
        size = self._container.storage_size(key)
        if size is None:
            raise CorruptError("a tensor's storage is missing", path=self._container.path, key=f"data/{key}")
        if size != count * kind.itemsize:
            raise CorruptError(
                f"a tensor asks for {count * kind.itemsize} bytes, the storage has {size}",
                path=self._container.path,
                key=f"data/{key}",
            )
        return _Inert()

    def _empty_dict(self) -> None:
        self.stack.append(_Dict(self))

    def _new_object(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.stack[-1](*args)

    def _other_opcode(self) -> None:
        raise UnsupportedError("its pickle is not what torch.save writes unless told otherwise")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **dict.fromkeys(pickle._Unpickler.dispatch, _other_opcode),
        **{code: run for code, run in pickle._Unpickler.dispatch.items() if code in _OPCODES},
        pickle.EMPTY_DICT[0]: _empty_dict,
        pickle.NEWOBJ[0]: _new_object,
    }
