"""Plain values and tensors as JSON, and back; used by `vraxion_ckpt.formats.document`.

A value is written as the same JSON value, with these exceptions: ``{"$tensor": name}`` refers to a stored tensor;
``{"$tuple": […]}`` is a tuple; ``{"$dict": [[key, value], …]}`` is a dict whose keys are not text, or begin with ``$``;
``{"$ordered": [[key, value], …]}`` is an OrderedDict; and ``{"$float": "7ff8000000000001"}`` holds the bits of a number
that is not finite.
"""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from vraxion_ckpt.checkpoint.plain_data import DEEPEST, bytes_of
from vraxion_ckpt.checkpoint.references import ITEMSIZES, TensorRef, contiguous_strides, reference
from vraxion_ckpt.checkpoint.shared_memory import view_of
from vraxion_ckpt.checkpoint.source_files import StoredBytes
from vraxion_ckpt.checkpoint.tensor_dict import SCALARS
from vraxion_ckpt.errors import InconsistentError, LimitError, raise_if_out_of_memory
from vraxion_ckpt.formats.extras import OUR_PREFIX

_PLACE = 300  # the longest place in characters, so that a long key is not copied for every entry below it
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
    if isinstance(value, TensorRef):
        return tensors.put(value, OUR_PREFIX + place)
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": struct.pack(">d", value).hex()}
    if isinstance(value, list | tuple):
        if _holds_only_json(value):
            entries = value
        else:
            entries = [encode_value(entry, f"{place}/{i}", tensors) for i, entry in enumerate(value)]
        return {"$tuple": entries} if isinstance(value, tuple) else entries
    if isinstance(value, dict):
        pairs = [[key, encode_value(entry, f"{place}/{key}"[:_PLACE], tensors)] for key, entry in value.items()]
        if isinstance(value, OrderedDict):
            found: dict[str, Any] = {"$ordered": pairs}
            if vars(value):
                found["attributes"] = encode_value(vars(value), place, tensors)
            return found
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$dict": pairs}
    return value


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
        self._made: dict[str, TensorRef] = {}

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
        if kind == "$tuple" and isinstance(inside, list):
            return tuple(self.decode(inside, place, depth))
        if kind == "$float":
            return struct.unpack(">d", bytes.fromhex(inside))[0]
        raise ValueError("there is no such kind of entry")

    def _pairs(self, pairs: Any, place: str, depth: int) -> list[tuple[Any, Any]]:
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ValueError("it must list pairs of key and value")
        if not all(type(key) in (str, int) for key, _ in pairs) or len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key is neither text nor an integer, or occurs twice")
        return [(key, self.decode(entry, f"{place}.{key}"[:_PLACE], depth + 1)) for key, entry in pairs]

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
        return self._made[key]

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


def _with_usual_strides(ref: TensorRef) -> TensorRef:
    return replace(ref, strides=contiguous_strides(ref.shape), first=0, _tensor=None)


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MOST_DIMENSIONS
        and all(type(size) is int and size >= 0 for size in value)
        and math.prod(size or 1 for size in value) <= _MOST_ELEMENTS
    )
