"""Stand-ins for the classes and functions that a ``.pt`` file may name, without torch.

They are those that ``torch.load(weights_only=True)`` allows, and those of numpy. The stand-ins make `TensorRef`s with
the checks that torch makes for tensors, and `NotPlain` for all that is not plain data. Memory and time are bounded by
the size of the pickle.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, NoReturn

from vraxion_ckpt.checkpoint.foreign_values import TORCH_NAMES, TorchSize, TorchValue
from vraxion_ckpt.checkpoint.plain_data import NotPlain
from vraxion_ckpt.checkpoint.references import ITEMSIZES, TensorRef
from vraxion_ckpt.checkpoint.source_files import StoredBytes
from vraxion_ckpt.errors import CkptError, CorruptError, LimitError, UnsafeError, UnsupportedError
from vraxion_ckpt.formats.numpy_stand_ins import numpy_stand_ins
from vraxion_ckpt.formats.pickle_scan import ORDERED_DICT
from vraxion_ckpt.wording import shortened


@dataclass(frozen=True)
class StorageType(NotPlain):
    """A stand-in for a storage class.

    Attributes:
        name: full name of the class.
        dtype: dtype of the elements.
    """

    name: str
    dtype: str

    def __call__(self, *_: Any) -> NoReturn:
        raise _memory_from_elsewhere(self.name)


class StandInStorage(NotPlain):
    """A stand-in for a storage.

    Attributes:
        dtype: dtype of the elements.
        stored: the bytes.
    """

    dtype: str
    stored: StoredBytes

    def __init__(self, dtype: str, stored: StoredBytes) -> None:
        # As a frozen dataclass does, but faster: there is one for each tensor.
        vars(self).update(description="is a storage", dtype=dtype, stored=stored)


def _memory_from_elsewhere(name: str) -> UnsafeError:
    return UnsafeError(f"its pickle would call {name}, which returns memory that is not in the file")


# dtypes of the storage classes that torch writes. It writes newer dtypes as UntypedStorage.
_DTYPES = {
    "Untyped": "uint8",
    "Bool": "bool",
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Float": "float32",
    "Double": "float64",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    **{name: name.lower() for name in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")},
}
_INTS = frozenset({int})
_FEW = 64  # dimensions
_QUANTISED = ("qint", "quint")
_PREFIX = ("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse")

# Functions of torch whose results are no plain data, and what they return.
_NOT_PLAIN = {
    "torch._tensor._rebuild_from_type_v2": "is a tensor subclass, or a tensor with attributes",
    "torch._utils._rebuild_device_tensor_from_numpy": "is a tensor of another kind of device",
    "torch._utils._rebuild_meta_tensor_no_storage": "is a tensor without data (on device meta)",
    "torch._utils._rebuild_nested_tensor": "is a nested tensor",
    "torch._utils._rebuild_parameter_with_state": "is a parameter with attributes",
    "torch._utils._rebuild_qtensor": "is a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "is a sparse tensor",
    "torch._utils._rebuild_wrapper_subclass": "is a tensor subclass",
    "torch.nn.parameter.Parameter": "is a parameter that torch.save does not write",
}
_MOST_COLLISIONS = 1000
_MOST_IN_KEY = 127
# Classes whose instances are memory that is not in the file.
_MEMORY = {
    "torch.Tensor",
    "torch.storage.TypedStorage",
    *(f"{prefix}.{kind}Tensor" for prefix in _PREFIX for kind in _DTYPES),
    *(f"torch.cuda.{kind}Storage" for kind in _DTYPES),
}
_STORAGES = {
    name: StorageType("is a storage class", name, dtype)
    for name, dtype in (
        ("torch.storage.UntypedStorage", "uint8"),
        *((f"torch.{kind}Storage", dtype) for kind, dtype in _DTYPES.items()),
    )
}


class KeyHashes:
    """The hashes of keys of one dict or set. Python takes hours to store many keys that have the same hash."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._number = 0

    def add(self, keys: Iterable[Any]) -> None:
        """Add keys.

        Raises:
            LimitError: too many keys have the same hash as another.
        """
        for key in keys:
            self._number += 1
            self._seen.add(hash(key))
        if self._number - len(self._seen) > _MOST_COLLISIONS:
            raise LimitError("has many keys whose hashes are the same, which would take too much time")


def check_size_of_key(key: tuple[Any, ...]) -> None:
    """Refuse to hash a tuple of many values.

    Raises:
        LimitError: the tuple has too many values; values in tuples in it count too.
    """
    left, pending = _MOST_IN_KEY, [key]
    while pending:
        found = pending.pop()
        left -= len(found)
        if left < 0:
            raise LimitError("has a key that is a tuple of more than a hundred values")
        pending += [entry for entry in found if type(entry) is tuple]


class StandIns:
    """The stand-ins for one pickle, by their full names.

    Args:
        size: bytes of the pickle.
    """

    def __init__(self, size: int) -> None:
        # In a pickle that torch.save wrote, calls copy each value at most once.
        self._copies_left = 1000 + 4 * size
        self.numpy = numpy_stand_ins(self.count)
        """The stand-ins for functions and classes of numpy, by their full names."""
        self._made: dict[str, Any] = {
            "_codecs.encode": self._encode,
            "builtins.bytearray": _class(self._bytearray),
            "builtins.bytes": _class(_empty_bytes),
            "builtins.complex": _class(_complex),
            "builtins.set": _class(self._set),
            "collections.Counter": _class(self._counter),
            ORDERED_DICT: _ordered_dict,
            "torch.Size": _class(_size),
            "torch.device": _class(_device),
            "torch.serialization._get_layout": _layout,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": _device_tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_tensor": self._bare_tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
        }

    def find(self, name: str) -> Any:
        """Return the stand-in of a class or function that is always allowed, or None if it has none.

        Raises:
            pickle.UnpicklingError: it would be a storage of a dtype that does not exist.
        """
        if name in self._made:
            return self._made[name]
        if name not in _CONSTANT and re.fullmatch(r"torch\.(storage\.)?\w+Storage", name):
            raise pickle.UnpicklingError(f"unknown storage type {name!r}")
        return _CONSTANT.get(name)

    def count(self, *values: Any) -> None:
        """Count the values that a call copies, because many calls may each copy the same long list.

        Raises:
            LimitError: they are far more than the pickle has.
        """
        for value in values:
            self._copies_left -= len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1
        if self._copies_left < 0:
            raise LimitError("its pickle copies far more data than it has")

    def _encode(self, *args: Any) -> bytes:
        self.count(*args)
        if len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
            return args[0].encode("latin1")
        # Some text encodings take hours for a megabyte.
        raise UnsafeError("its pickle would call _codecs.encode with arguments other than bytes")

    def _bytearray(self, *args: Any) -> bytearray:
        if len(args) > 1 or not all(type(arg) is bytes for arg in args):  # bytearray(n) allocates n bytes
            raise UnsafeError("its pickle would call builtins.bytearray with arguments other than bytes")
        self.count(*args)
        return bytearray(*args)

    def _set(self, *args: Any) -> set[Any]:
        if len(args) > 1 or not all(type(arg) is list for arg in args):
            raise UnsupportedError("holds a set that torch.save does not write")
        self.count(*args)
        for entry in (entry for arg in args for entry in arg if type(entry) is tuple):
            check_size_of_key(entry)
        KeyHashes().add(entry for arg in args for entry in arg)
        return set(*args)

    def _counter(self, *args: Any) -> Counter[Any]:
        if len(args) > 1 or not all(type(arg) is dict for arg in args):
            raise UnsupportedError("holds a Counter that torch.save does not write")
        self.count(*args)
        return Counter(*args)

    def _tensor(
        self,
        storage: Any,
        first: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any,
        hooks: Any,
        metadata: Any = None,
    ) -> TensorRef | NotPlain:
        if type(storage) is not StandInStorage:
            raise CorruptError("torch cannot read it: a tensor without a storage")
        if storage.dtype.startswith(_QUANTISED):
            return NotPlain("is a quantised tensor")
        if type(shape) is tuple and len(shape) > _FEW:
            self.count(shape, strides)
        _check_layout(storage.stored.nbytes, storage.dtype, first, shape, strides)
        conj, neg = _bits(metadata, storage.dtype) if metadata else (False, False)
        ref = TensorRef(storage.stored, storage.dtype, shape, strides, first, conj=conj, neg=neg)
        if hooks or requires_grad is not False:
            _require_grad(ref, requires_grad, hooks)
        return ref

    def _bare_tensor(self, storage: Any, first: Any, shape: Any, strides: Any) -> TensorRef | NotPlain:
        return self._tensor(storage, first, shape, strides, False, None)

    def _tensor_v3(
        self,
        storage: Any,
        first: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any,
        hooks: Any,
        dtype: Any,
        metadata: Any = None,
    ) -> TensorRef | NotPlain:
        if type(storage) is not StandInStorage or not _is_dtype(dtype):
            raise CorruptError("torch cannot read it: a tensor without a storage or a dtype")
        if dtype.text not in ITEMSIZES:
            return NotPlain(f"is a tensor of dtype {dtype.text}")
        if requires_grad is not False:
            raise CorruptError(f"torch cannot read it: a tensor of dtype {dtype.text} that requires gradients")
        return self._tensor(StandInStorage(dtype.text, storage.stored), first, shape, strides, False, hooks, metadata)


def _check_layout(held: int, dtype: str, first: Any, shape: Any, strides: Any) -> None:
    """Refuse a tensor whose elements are not all in its storage of `held` bytes."""
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise CorruptError("torch cannot read it: a tensor whose shape and strides do not fit each other")
    numbers = (first, *shape, *strides)
    if not _INTS.issuperset(map(type, numbers)) or min(numbers) < 0 or max(numbers) >= 2**63:
        raise CorruptError("torch cannot read it: a tensor whose shape, strides or offset are negative or no numbers")
    if 0 in shape:
        if prod(filter(None, shape)) >= 2**63:
            raise CorruptError(f"torch cannot read it: a tensor of shape {_text(shape)}, which is too large")
        return
    last = first
    for size, stride in zip(shape, strides, strict=True):
        last += (size - 1) * stride
    if (last + 1) * ITEMSIZES[dtype] > held:
        place = f"shape {_text(shape)}, strides {_text(strides)} and offset {first}"
        raise CorruptError(f"torch cannot read it: a tensor of {place} exceeds its storage of {held} bytes")


def _text(numbers: tuple[int, ...]) -> str:
    return shortened(str(list(numbers[:20])), 200)


def _bits(metadata: Any, dtype: str) -> tuple[bool, bool]:
    """Return whether a tensor is conjugated, and whether it is negated."""
    if (
        type(metadata) is not dict
        or not {"conj", "neg"}.issuperset(metadata)
        or any(type(value) is not bool for value in metadata.values())
    ):
        raise CorruptError("torch cannot read it: a tensor with unknown metadata")
    conj, neg = metadata.get("conj", False), metadata.get("neg", False)
    if conj and not dtype.startswith("complex"):
        raise CorruptError("torch cannot read it: a conjugated tensor that is not complex")
    return conj, neg


def _require_grad(ref: TensorRef, requires_grad: Any, hooks: Any) -> None:
    if hooks or type(requires_grad) is not bool:
        raise CorruptError("torch cannot read it: a tensor with hooks, or without a flag for gradients")
    if requires_grad and not (ref.is_floating_point() or ref.is_complex()):
        raise CorruptError(f"torch cannot read it: a tensor of dtype {ref.dtype} that requires gradients")
    ref.requires_grad = requires_grad


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> TensorRef | NotPlain:
    if isinstance(data, NotPlain):
        return data
    if type(data) is not TensorRef:
        raise CorruptError("torch cannot read it: a parameter without a tensor")
    ref = replace(data, parameter=True)
    _require_grad(ref, requires_grad, hooks)
    return ref


def _device_tensor(data: Any, dtype: Any, _: Any, requires_grad: Any) -> TensorRef:
    """Return a tensor that was saved from a device without storages; torch loads it onto the CPU."""
    if type(data) is not TensorRef or dtype != TorchValue("dtype", data.dtype):
        raise UnsupportedError("holds a tensor of another kind of device; only plain data can be carried")
    ref = replace(data)
    _require_grad(ref, requires_grad, None)
    return ref


def _ordered_dict(*args: Any) -> OrderedDict[Any, Any]:
    if args:
        raise pickle.UnpicklingError("an OrderedDict with arguments")
    return OrderedDict()


def _is_dtype(value: Any) -> bool:
    return type(value) is TorchValue and value.kind == "dtype"


def _empty_bytes(*args: Any) -> bytes:
    if args:  # bytes(n) allocates n bytes
        raise UnsafeError("its pickle would call builtins.bytes with arguments")
    return b""


def _complex(*args: Any) -> complex:
    if len(args) > 2 or not {int, float}.issuperset(map(type, args)):
        raise pickle.UnpicklingError("a complex number of other values than numbers")
    return complex(*args)


def _size(*args: Any) -> TorchSize:
    sizes = args[0] if args else ()
    if len(args) > 1 or type(sizes) is not tuple or len(sizes) > _FEW or not _INTS.issuperset(map(type, sizes)):
        raise UnsupportedError("holds a torch.Size that torch.save does not write")
    if any(not -(2**63) <= size < 2**63 for size in sizes):
        raise CorruptError("torch cannot read it: a torch.Size of numbers that are too large")
    return TorchSize(sizes)


def _device(kind: Any = None, index: Any = None) -> TorchValue:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise UnsupportedError("holds a torch.device that torch.save does not write")
    return TorchValue("device", kind if index is None else f"{kind}:{index}")


def _layout(name: Any) -> TorchValue:
    return TorchValue("layout", name.removeprefix("torch."))


def _class(make: Callable[..., Any]) -> type:
    """Return a class whose instances are what `make` returns, because a pickle may call a class in two ways."""
    return type("StandIn", (), {"__new__": lambda _, *args: make(*args)})


def _refusal(error: CkptError) -> type:
    def refuse(*_: Any) -> NoReturn:
        raise error.with_facts()  # a copy, because the traceback is added to the error

    return _class(refuse)


def _not_plain(what: str, *_: Any) -> NotPlain:
    return NotPlain(what)


_CONSTANT: dict[str, Any] = {
    **{f"torch.{name}": TorchValue(kind, name) for kind in ("dtype", "qscheme") for name in TORCH_NAMES[kind]},
    **_STORAGES,
    **{name: _class(partial(_not_plain, what)) for name, what in _NOT_PLAIN.items()},
    **{name: _refusal(_memory_from_elsewhere(name)) for name in _MEMORY},
}
