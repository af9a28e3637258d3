"""Plain values and tensors as JSON, and back; used by `vraxion_ckpt.formats.document`.

A value is written as the same JSON value, with these exceptions:

- ``{"$tensor": name}`` refers to a stored tensor.
- ``{"$tuple": […]}``, ``{"$set": […]}`` and ``{"$size": […]}`` are a tuple, a set and a `torch.Size`.
- ``{"$dict": [[key, value], …]}`` is a dict whose keys are not text, or begin with ``$``. ``{"$ordered": …}`` and
  ``{"$counter": …}`` are an OrderedDict and a Counter. Keys are encoded like values.
- ``{"$float": "7ff8000000000001"}`` holds the bits of a number that is not finite; ``{"$complex": [real, imaginary]}``
  is a complex number.
- ``{"$bytes": data}`` and ``{"$bytearray": data}`` hold bytes: as hexadecimal digits, or, if there are many, as a list
  of the name under which they are stored.
- ``{"$torch": [kind, text]}``, ``{"$number": [dtype, data]}`` and ``{"$array": [dtype, shape, fortran, data]}`` are the
  stand-ins of `vraxion_ckpt.checkpoint.foreign_values`, with their fields.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from vraxion_ckpt.checkpoint.foreign_values import NumpyArray, NumpyNumber, TorchSize, TorchValue, stand_in_of
from vraxion_ckpt.checkpoint.plain_data import DEEPEST, bytes_of, in_fixed_order
from vraxion_ckpt.checkpoint.references import ITEMSIZES, TensorRef, contiguous_strides, reference
from vraxion_ckpt.checkpoint.shared_memory import view_of
from vraxion_ckpt.checkpoint.source_files import StoredBytes
from vraxion_ckpt.checkpoint.tensor_dict import SCALARS
from vraxion_ckpt.errors import InconsistentError, LimitError, raise_if_out_of_memory
from vraxion_ckpt.formats.extras import OUR_PREFIX
from vraxion_ckpt.formats.stand_ins import KeyHashes

_PLACE = 300  # the longest place in characters, so that a long key is not copied for every entry below it
_MOST_DIGITS = 2**10  # bytes that are written as digits
_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 2**48  # of a tensor; an empty dimension counts as 1
_QUANTISED = "q"  # the names of quantised dtypes, which need a scale, begin with this


class TensorStore:
    """Tensors to store, by name. A tensor that is put twice is stored once.

    Args:
        dtypes: names of the dtypes that the format can hold; tensors of other dtypes are stored as bytes.
        is_name: a function that tells whether the format accepts a name for a tensor.
    """

    def __init__(self, dtypes: Collection[str], is_name: Callable[[str], bool]) -> None:
        self.by_name: dict[str, TensorRef] = {}
        self._dtypes = dtypes
        self._is_name = is_name
        self._known: dict[Any, str] = {}
        self._bytes: dict[int, tuple[bytes, list[str]]] = {}  # by the ids of the bytes, which this keeps in use

    def put_bytes(self, data: bytes, wanted: str) -> str | list[str]:
        """Return JSON that holds bytes: their digits, or if there are many, the name under which they are stored."""
        if len(data) <= _MOST_DIGITS:
            return data.hex()
        if id(data) not in self._bytes:
            import torch

            tensor = reference(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            self._bytes[id(data)] = data, [self.put(tensor, wanted)["$tensor"]]
        return self._bytes[id(data)][1]

    def put(self, tensor: TensorRef, wanted: str) -> dict[str, Any]:
        """Store a tensor, if possible under the name `wanted`, and return the JSON that refers to the tensor."""
        view = view_of(tensor)
        name = self._known.get(view) if tensor.numel() else None
        native = tensor.dtype in self._dtypes
        if name is None:
            name = self._free(wanted)
            self._known[view] = name
            self.by_name[name] = tensor if native else _as_bytes(tensor)
        found: dict[str, Any] = {"$tensor": name}
        if not native:
            found |= {"dtype": tensor.dtype, "shape": list(tensor.shape)}
        if tensor.parameter:
            found["parameter"] = tensor.requires_grad
        elif tensor.requires_grad:
            found["requires_grad"] = True
        return found

    def _free(self, wanted: str) -> str:
        if self._is_name(wanted) and wanted not in self.by_name:
            return wanted
        number = len(self.by_name)
        while f"{OUR_PREFIX}{number}" in self.by_name:
            number += 1
        return f"{OUR_PREFIX}{number}"


def _as_bytes(tensor: TensorRef) -> TensorRef:
    """Return a tensor's elements as bytes, dtype uint8 and shape ``[n]``."""
    if not tensor.is_contiguous() or tensor.conj or tensor.neg:
        return reference(bytes_of(tensor.read_only_tensor()))
    first = tensor.first * tensor.itemsize
    return TensorRef(tensor.storage, "uint8", (tensor.nbytes,), (1,), first)


def encode_value(value: Any, place: str, tensors: TensorStore) -> Any:
    """Return a plain value as JSON data, and store the tensors in it under names that begin with `place`."""
    value = stand_in_of(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, TensorRef):
        return tensors.put(value, OUR_PREFIX + place)
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": struct.pack(">d", value).hex()}
    if isinstance(value, TorchSize):
        return {"$size": list(value)}
    if isinstance(value, list | tuple | set):
        if _holds_only_json(value) and not isinstance(value, set):
            entries = value
        else:
            listed = in_fixed_order(value) if isinstance(value, set) else value
            entries = [encode_value(entry, f"{place}/{i}", tensors) for i, entry in enumerate(listed)]
        return entries if isinstance(value, list) else {f"${type(value).__name__}": entries}
    if isinstance(value, dict):
        if type(value) is dict and all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode_value(entry, f"{place}/{key}"[:_PLACE], tensors) for key, entry in value.items()}
        pairs = [
            [
                key if type(key) in (str, int) else encode_value(key, place, tensors),
                encode_value(entry, f"{place}/{key}"[:_PLACE], tensors),
            ]
            for key, entry in value.items()
        ]
        if isinstance(value, Counter):
            return {"$counter": pairs}
        if not isinstance(value, OrderedDict):
            return {"$dict": pairs}
        found: dict[str, Any] = {"$ordered": pairs}
        if vars(value):
            found["attributes"] = encode_value(vars(value), place, tensors)
        return found
    encode = _ENCODERS.get(type(value))
    return value if encode is None else encode(value, place, tensors)


_ENCODERS: dict[type, Callable[[Any, str, TensorStore], Any]] = {
    bytes: lambda value, place, tensors: {"$bytes": tensors.put_bytes(value, OUR_PREFIX + place)},
    bytearray: lambda value, place, tensors: {"$bytearray": tensors.put_bytes(bytes(value), OUR_PREFIX + place)},
    complex: lambda value, *where: {"$complex": [encode_value(part, *where) for part in (value.real, value.imag)]},
    TorchValue: lambda value, *_: {"$torch": [value.kind, value.text]},
    NumpyNumber: lambda value, place, tensors: {
        "$number": [value.dtype, tensors.put_bytes(value.data, OUR_PREFIX + place)]
    },
    NumpyArray: lambda value, place, tensors: {
        "$array": [
            value.dtype,
            list(value.shape),
            value.fortran,
            tensors.put_bytes(value.data, OUR_PREFIX + place),
        ]
    },
}


def _holds_only_json(values: Collection[Any]) -> bool:
    """Return whether all entries are scalars that are written as they are."""
    kinds = set(map(type, values))
    if not kinds <= SCALARS:
        return False
    return float not in kinds or all(math.isfinite(value) for value in values if type(value) is float)


class ValueDecoder:
    """Turns JSON data back into plain values.

    Attributes:
        used: the names of the stored tensors to which the decoded data referred.
    """

    def __init__(self, tensors: Mapping[str, TensorRef]) -> None:
        self.used: set[str] = set()
        # Formats differ in the strides that they give to an empty tensor.
        self._tensors = {name: ref if ref.numel() else _with_usual_strides(ref) for name, ref in tensors.items()}
        self._made: dict[str, Any] = {}  # by the JSON from which they were made
        self._owners: dict[str, str] = {}  # JSON of the entries that are made of stored bytes, by the names of these

    def decode(self, value: Any, place: str, depth: int = 0) -> Any:
        """Return the plain value of JSON data; errors name `place`.

        Raises:
            InconsistentError: the data is not what `encode_value` returns, or refers to a missing tensor.
            LimitError: the data is nested too deeply.
        """
        if depth > DEEPEST:
            raise LimitError(f"is nested deeper than {DEEPEST}", key=place)
        if isinstance(value, list):
            if depth < DEEPEST and SCALARS.issuperset(map(type, value)):
                return value
            return [self.decode(entry, f"{place}[{i}]", depth + 1) for i, entry in enumerate(value)]
        if not isinstance(value, dict):
            return value
        special = next((key for key in value if key.startswith("$")), None)
        if special is None:
            return {key: self.decode(entry, f"{place}.{key}"[:_PLACE], depth + 1) for key, entry in value.items()}
        try:
            return self._special(special, value, place, depth)
        except (TypeError, ValueError, KeyError, AttributeError, struct.error, RuntimeError) as error:
            raise_if_out_of_memory(error)
            raise InconsistentError(f"is not a valid {special[:_PLACE]} entry: {error}", key=place) from error

    def _special(self, kind: str, value: dict[str, Any], place: str, depth: int) -> Any:
        inside = value[kind]
        if kind == "$tensor":
            return self._tensor(value, place)
        if kind == "$ordered" and value.keys() <= {kind, "attributes"}:
            ordered = OrderedDict(self._pairs(inside, place, depth))
            attributes = self.decode(value.get("attributes", {}), place, depth + 1)
            if not isinstance(attributes, dict) or any(hasattr(OrderedDict, name) for name in attributes):
                raise ValueError("its attributes must be a dict, and not hide any of OrderedDict's")
            vars(ordered).update(attributes)
            return ordered
        if len(value) != 1:
            raise ValueError("it must have only this one key")
        if kind == "$dict":
            return dict(self._pairs(inside, place, depth))
        if kind == "$counter":
            return Counter(dict(self._pairs(inside, place, depth)))
        if kind == "$float":
            return struct.unpack(">d", bytes.fromhex(inside))[0]
        if kind in _MADE_OF_BYTES:
            return self._made_of_bytes(kind, inside, place)
        if kind not in ("$tuple", "$set", "$size", "$complex", "$torch"):
            raise ValueError("there is no such kind of entry")
        if not isinstance(inside, list):
            raise ValueError("it must be a list")
        entries = self.decode(inside, place, depth)
        if kind == "$tuple":
            return tuple(entries)
        if kind == "$set":
            return set(_distinct(entries))
        if kind == "$size":
            if len(entries) > _MOST_DIMENSIONS or not {int}.issuperset(map(type, entries)):
                raise ValueError("it must list integers")
            return TorchSize(entries)
        first, second = entries
        if kind == "$torch" and type(first) is type(second) is str:
            return TorchValue(first, second)
        if kind == "$complex" and type(first) is type(second) is float:
            return complex(first, second)
        raise ValueError("it has an entry of a wrong type")

    def _made_of_bytes(self, kind: str, inside: Any, place: str) -> Any:
        key = json.dumps([kind, inside])
        if key not in self._made:  # equal entries become the same object
            *fields, data = inside if kind in ("$number", "$array") else [inside]
            if not isinstance(data, str):
                (name,) = data
                if self._owners.setdefault(name, key) != key:  # a small file could have arrays that fill the memory
                    raise ValueError("its bytes belong to another entry")
                tensor = self._tensor({"$tensor": name}, place)
                if tensor.dtype != "uint8" or tensor.ndim != 1 or not tensor.is_contiguous():
                    raise ValueError("it is not stored as bytes")
                found = tensor.storage.read(tensor.first, tensor.nbytes)
            else:
                found = bytes.fromhex(data)
            self._made[key] = _MADE_OF_BYTES[kind](*fields, found)
        return self._made[key]

    def _pairs(self, pairs: Any, place: str, depth: int) -> list[tuple[Any, Any]]:
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ValueError("it must list pairs of key and value")
        keys = _distinct([key if type(key) in (str, int) else self.decode(key, place, depth + 1) for key, _ in pairs])
        return [
            (key, self.decode(entry, f"{place}.{key}"[:_PLACE], depth + 1))
            for key, (_, entry) in zip(keys, pairs, strict=True)
        ]

    def _tensor(self, found: dict[str, Any], place: str) -> TensorRef:
        if not found.keys() <= {"$tensor", "dtype", "shape", "parameter", "requires_grad"}:
            raise ValueError("it has unknown further entries")
        name = found["$tensor"]
        if name not in self._tensors:
            raise InconsistentError(f"refers to the tensor {name!r}, which does not exist", key=place)
        self.used.add(name)
        key = json.dumps(found)
        if key not in self._made:  # equal entries become the same reference
            if not all(type(found.get(flag, True)) is bool for flag in ("parameter", "requires_grad")):
                raise ValueError("`parameter` and `requires_grad` must be true or false")
            foreign = "dtype" in found or "shape" in found
            tensor = self._from_bytes(name, found["dtype"], found["shape"]) if foreign else self._tensors[name]
            if "parameter" in found:
                if found["parameter"] and not (tensor.is_floating_point() or tensor.is_complex()):
                    raise ValueError(f"a parameter of {tensor.dtype} has no gradient")
                tensor = replace(tensor, parameter=True, requires_grad=found["parameter"], _tensor=None)
            elif found.get("requires_grad"):
                if not (tensor.is_floating_point() or tensor.is_complex()):
                    raise ValueError(f"a tensor of {tensor.dtype} has no gradient")
                tensor = replace(tensor, requires_grad=True, _tensor=None)
            self._made[key] = tensor
        made: TensorRef = self._made[key]
        return made

    def _from_bytes(self, name: str, dtype_name: str, shape: list[int]) -> TensorRef:
        """Return a tensor that is stored as bytes, because the format cannot hold its dtype."""
        tensor, itemsize = self._tensors[name], ITEMSIZES[dtype_name]
        if tensor.dtype != "uint8" or tensor.ndim != 1 or dtype_name.startswith(_QUANTISED):
            raise ValueError("it is not stored as bytes")
        if not _is_shape(shape):
            raise ValueError("its shape is not valid")
        if math.prod(shape) * itemsize != tensor.nbytes or not tensor.is_contiguous():
            raise ValueError(f"it needs {math.prod(shape) * itemsize} bytes, but {tensor.nbytes} are stored")
        if isinstance(tensor.storage, StoredBytes):  # some operations need aligned memory
            tensor.storage.alignment = max(tensor.storage.alignment, itemsize)
        first, uneven = divmod(tensor.first, itemsize)
        if uneven:
            raise ValueError("its bytes are not aligned")
        return TensorRef(tensor.storage, dtype_name, tuple(shape), contiguous_strides(tuple(shape)), first)


_MADE_OF_BYTES: dict[str, Callable[..., Any]] = {
    "$bytes": bytes,
    "$bytearray": bytearray,
    "$number": NumpyNumber,
    "$array": lambda dtype, shape, fortran, data: NumpyArray(dtype, tuple(shape), fortran, data),
}


def _distinct(keys: list[Any]) -> list[Any]:
    """Return keys of a dict, or entries of a set, that can be hashed in reasonable time and occur once."""
    if any(isinstance(key, TensorRef) for key in keys):
        raise ValueError("a key is a tensor")
    KeyHashes().add(keys)
    if len(set(keys)) != len(keys):
        raise ValueError("a key occurs twice")
    return keys


def _with_usual_strides(ref: TensorRef) -> TensorRef:
    return replace(ref, strides=contiguous_strides(ref.shape), first=0, _tensor=None)


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MOST_DIMENSIONS
        and all(type(size) is int and size >= 0 for size in value)
        and math.prod(size or 1 for size in value) <= _MOST_ELEMENTS
    )
