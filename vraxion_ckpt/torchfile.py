"""The one door to torch's file format: load safely and mapped, save.

``torch.load`` believes the sizes in a file's pickle and returns whatever types it allows. So before torch sees a
file, its container is checked (`vraxion_ckpt.container`) and what the pickle asks for is compared with what
the container holds; after torch, whatever a converter cannot vouch for is refused. Nothing else in this
project opens or writes a ``.pt``.
"""

from __future__ import annotations

import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn, cast

import numpy
import torch
from torch import Tensor, nn

from vraxion_ckpt.container import Container, check, mapped
from vraxion_ckpt.errors import (
    CkptError,
    CorruptError,
    InconsistentError,
    LimitError,
    StorageError,
    UnsafeError,
    UnsupportedError,
    UsageError,
)
from vraxion_ckpt.sources import Sources

_MOST_NODES = 5_000_000
_DEEPEST = 100

# --- What the pickle asks for ---


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
    rehearsal: _Rehearsal

    def __call__(self, *args: Any) -> Any:
        return self.rehearsal.call(self.name, args)


@dataclass(eq=False)
class _Dict(dict[Any, Any]):
    """A dict or OrderedDict of the pickle."""

    rehearsal: _Rehearsal

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


class _Rehearsal(pickle._Unpickler):  # the pure-Python one: C's allocates whatever a memo index asks for
    """Run a pickle with every name replaced by something inert, to see what it asks for."""

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


# --- Load ---


def load(path: Path, sources: Sources, allow_globals: Sequence[str] = ()) -> Any:
    """Load a file of ``torch.save``: safely, mapped, on the CPU, and only if it holds plain data.

    Args:
        path: the file; it is registered in `sources`, which later verifies the storages' checksums.
        sources: the files read so far.
        allow_globals: full names of further classes or functions that its pickle may use, such as
            ``numpy.dtype``; numpy scalars that come of it are turned into Python numbers.

    Returns:
        dicts, lists, tuples, text, numbers, None and tensors; tensors are views of the mapped file.

    Raises:
        SourceError: see `check`; also `UnsafeError` naming what the pickle would have called.
        ChangedError: the file was replaced meanwhile.
    """
    _require_torch()
    container = check(path)
    with mapped(path) as data:
        member = container.members[f"{container.prefix}/data.pkl"]
        pickled = bytes(data[member.start : member.start + member.size])
    try:
        _Rehearsal(pickled, container).load()
    except CkptError as error:
        error.path = error.path or path
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptError(f"its pickle is damaged: {_first_line(error)}", path=path) from error
    try:
        with torch.serialization.safe_globals(_find_globals(allow_globals)):
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        _refuse_pickle(path, error, allow_globals)
    except Exception as error:
        raise CorruptError(f"torch cannot read it: {_first_line(error)}", path=path) from error
    opened = Sources()
    opened.add(path, container.fingerprint, container.verify)
    opened.check_unchanged()  # torch has opened it once more, by its name
    sources.files.extend(opened)
    if allow_globals:
        value = _plain(value, 0, path, {})
    check_plain(value, path)
    return value


def _require_torch() -> None:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < (2, 10):
        raise UsageError(
            f"torch {torch.__version__} is installed; 2.10 is needed to load files safely",
            hint="pip install --upgrade torch",
        )


def _find_globals(names: Sequence[str]) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            found.append((getattr(import_module(module), attribute), name))
        except (ImportError, AttributeError, ValueError):
            raise UsageError(f"--allow-global {name}: there is no such class or function") from None
    if "numpy.dtype" in names:  # makes instances of these, which no pickle names
        found += [type(numpy.dtype(code)) for code in numpy.typecodes["All"] if code not in "OV"]
    return found


def _refuse_pickle(path: Path, error: Exception, allowed: Sequence[str]) -> NoReturn:
    try:
        unsafe = [n for n in torch.serialization.get_unsafe_globals_in_checkpoint(path) if n not in allowed]
    except Exception:  # torch's own look at the pickle failed too
        unsafe = []
    if unsafe:
        raise UnsafeError(
            f"its pickle would call {', '.join(sorted(unsafe))}",
            path=path,
            hint="if you trust each of them: " + " ".join(f"--allow-global {name}" for name in sorted(unsafe)),
        ) from error
    # torch puts its reason between advice to load the file unsafely and where to read on.
    paragraphs = str(error).split("\n\n")
    reason = paragraphs[-2 if len(paragraphs) > 1 else 0].strip()
    raise UnsafeError(f"torch refuses its pickle: {reason[:200]}", path=path) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _plain(value: Any, depth: int, path: Path, done: dict[int, Any]) -> Any:
    """Turn numpy scalars into Python numbers of the same value, in new containers; `done` holds those, by id."""
    if depth > _DEEPEST:
        raise LimitError(f"is nested deeper than {_DEEPEST}", path=path)
    if id(value) in done:
        return done[id(value)]
    new: Any = value
    if isinstance(value, OrderedDict):
        new = OrderedDict((k, _plain(v, depth + 1, path, done)) for k, v in value.items())
        new.__dict__.update(value.__dict__)
    elif type(value) is dict:
        new = {k: _plain(v, depth + 1, path, done) for k, v in value.items()}
    elif type(value) in (list, tuple):
        new = type(value)(_plain(v, depth + 1, path, done) for v in value)
    elif type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    else:
        return value
    done[id(value)] = new
    return new


# --- Only plain data ---

_SCALARS = frozenset({str, int, float, bool, type(None)})
# A place in a structure: the place of what holds it, and its key there. Spelt out only for an error.
_Place = tuple[Any, Any] | None


def check_plain(value: Any, path: Path | None = None) -> None:
    """Refuse whatever a converter cannot vouch for; what remains is safe for any loader.

    Raises:
        UnsupportedError: an object that is not plain data, or a sparse, quantised, nested, meta or subclass
            tensor, or one with attributes.
        LimitError: nesting deeper than 100, more than five million values, or a tensor that repeats or exceeds
            its storage.
        InconsistentError: a dict key that is neither text nor a whole number.
    """
    _measure(value, path, 0, None, {})


def _measure(
    item: Any, path: Path | None, depth: int, place: _Place, seen: dict[int, tuple[int, int]]
) -> tuple[int, int]:
    """Check one item; return how many values it holds and how many levels of containers.

    What was `seen`, by id, is counted again but not looked at again: lists that share lists may hold more values
    than could ever be walked through.
    """
    kind = type(item)
    if kind in _SCALARS:
        return 1, 0
    if kind is Tensor or kind is nn.Parameter:
        _check_tensor(item, path, place)
        return 1, 0
    if kind not in (dict, OrderedDict, list, tuple):
        message = f"is a {kind.__module__}.{kind.__qualname__}; only plain data can be carried"
        raise UnsupportedError(message, path=path, key=_spell(place))
    if id(item) not in seen:
        if depth >= _DEEPEST:
            raise LimitError(f"is nested deeper than {_DEEPEST}", path=path)
        entries: Iterable[tuple[Any, Any]] = ()
        if kind is dict or kind is OrderedDict:
            _check_keys(item, path, place)
            attributes = vars(item) if kind is OrderedDict else None
            entries = [*item.items(), *([("<attributes>", attributes)] if attributes else ())]
        elif not _SCALARS.issuperset(map(type, item)):
            entries = enumerate(item)
        nodes, levels = 1 + len(item), 0
        for key, entry in entries:
            below, deep = _measure(entry, path, depth + 1, (place, key), seen)
            nodes, levels = nodes + below - 1, max(levels, deep)
        seen[id(item)] = nodes, levels + 1
    nodes, levels = seen[id(item)]
    if depth + levels > _DEEPEST:
        raise LimitError(f"is nested deeper than {_DEEPEST}", path=path)
    if nodes > _MOST_NODES:
        raise LimitError(f"holds more than {_MOST_NODES} values", path=path, key=_spell(place))
    return nodes, levels


def _check_keys(item: dict[Any, Any], path: Path | None, place: _Place) -> None:
    for key in item:
        if type(key) not in (str, int):
            raise InconsistentError(
                f"has a key of type {type(key).__name__}, not text", path=path, key=_spell(place) or "top level"
            )


def _check_tensor(tensor: Tensor, path: Path | None, place: _Place) -> None:
    def refuse(error: type[CkptError], message: str) -> NoReturn:
        raise error(message, path=path, key=_spell(place))

    if tensor.is_nested:  # which has a strided layout, but no shape
        refuse(UnsupportedError, "is a nested tensor")
    if tensor.layout != torch.strided:
        refuse(UnsupportedError, f"is a sparse tensor ({tensor.layout})")
    if tensor.is_quantized:
        refuse(UnsupportedError, "is a quantised tensor")
    if tensor.device.type != "cpu":
        refuse(UnsupportedError, f"is a tensor without data (on device {tensor.device})")
    if vars(tensor):
        refuse(UnsupportedError, f"has attributes ({', '.join(vars(tensor))}); only plain data can be carried")
    held = tensor.untyped_storage().nbytes() // tensor.itemsize
    if tensor.numel() > held:
        refuse(LimitError, f"repeats its storage: {tensor.numel()} elements from {held}")
    if any(size > 2**48 for size in tensor.shape):
        refuse(LimitError, f"has an absurd shape {list(tensor.shape)}")
    if not tensor.is_contiguous() and _overlaps(tensor):
        refuse(LimitError, "repeats its storage: elements overlap")


def _overlaps(tensor: Tensor) -> bool:
    """Tell whether two elements of a strided tensor may lie on each other."""
    reach = 0  # the farthest element of the dimensions looked at so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _spell(place: _Place) -> str | None:
    parts: list[str] = []
    while place is not None:
        place, key = place
        parts.append(f"[{key}]" if isinstance(key, int) else f".{key}")
    text = "".join(reversed(parts)).removeprefix(".")
    return (text if len(text) <= 200 else text[:200] + "…") or None


# --- Save ---


def save(value: Any, path: Path) -> None:
    """Write plain data as ``torch.save`` does, to a new file; tensors are streamed, not copied.

    The archive's inner name does not depend on `path`, so the same data gives the same bytes.

    Raises:
        UnsupportedError: `value` holds something that is not plain data.
        StorageError: the file cannot be written; the message has the reason.
    """
    check_plain(value)
    writer = None
    try:
        with path.open("xb") as file:
            writer = _Writer(file)
            torch.save(value, cast("BinaryIO", writer))
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    except RuntimeError as error:
        # torch reports a failed write in words of its own; the reason is what the file said.
        if writer is not None and writer.error is not None:
            raise StorageError.from_os_error(writer.error, path) from error
        raise


class _Writer:
    """A file that remembers why a write failed, since torch forgets."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()
