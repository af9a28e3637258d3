"""A checkpoint as named tensors and one JSON document: all that a format needs which holds tensors and text.

The model's tensors keep their state-dict names. Every other tensor (the optimizer's, the payload's) gets a name that
begins with `OUR_PREFIX`; so does one of the model whose name or dtype the format cannot hold, and such a dtype is
stored as bytes. Tensors that are one have one name. The document says which tensor stands where, and holds the rest:
training state, groups, lifecycle rows, history, dialects.

In the document a value stands for itself, but for what JSON cannot tell: ``{"$tensor": name}``, ``{"$tuple": […]}``,
``{"$dict": [[key, value], …]}`` and ``{"$ordered": …}`` for dicts with other keys than text and for OrderedDicts,
``{"$float": "7ff8000000000001"}`` for a number that is not finite, by its bits.
"""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from vraxion_ckpt.checkpoint.head_names import VRAXION
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, ParamGroup
from vraxion_ckpt.checkpoint.plain_data import DEEPEST, bytes_of, check_plain, dtype_name
from vraxion_ckpt.checkpoint.provenance import Origin
from vraxion_ckpt.checkpoint.shared_memory import view_of
from vraxion_ckpt.errors import (
    InconsistentError,
    LimitError,
    errors_at,
    raise_if_out_of_memory,
)
from vraxion_ckpt.formats.payload import OUR_KEY, Extras, origin_of_state_dict, parse_extras, refuse_newer, split_head
from vraxion_ckpt.support.model_errors import refusals

OUR_PREFIX = f"{OUR_KEY}/"
_PLACE = 300  # characters of a place that are kept: a long key must not be copied for every entry below it
_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 2**48  # of a tensor, were none of its dimensions empty
_DTYPES = {dtype_name(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_QUANTISED = "q"  # how the names of dtypes begin that mean nothing without a scale


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid")

    options: Any
    params: list[str]
    keys: list[str]


class _Optimizer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    groups: list[_Group]
    state: Any
    extra: Any
    undecided: list[str] = []
    prefixes: tuple[str, str] = ("", "")


class _Document(BaseModel):
    """What stands in a document.

    Attributes:
        model: the state dict in its order; a name alone where the tensor is stored under it as it is.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1]
    model: list[str | tuple[str, Any]]
    metadata: Any = None
    payload: Any
    param_names: list[str] | None = None
    optimizer: _Optimizer | None = None
    extras: Any


# --- dump ---


def dump_document(
    checkpoint: Checkpoint, dtypes: Collection[torch.dtype], is_name: Callable[[str], bool]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take a checkpoint apart.

    Args:
        checkpoint: its optimizer is bound.
        dtypes: those that the format holds; uint8 is one of them.
        is_name: whether the format can hold a tensor of that name.

    Returns:
        tensors by the name to store them under, each of one of `dtypes` and perhaps not contiguous; and the document.
    """
    tensors = _Stored(dtypes, is_name)
    model: list[Any] = []
    for name, tensor in checkpoint.state_dict().items():
        # Bytes under the name of a tensor would be taken for the tensor by whoever does not know the document.
        as_it_is = is_name(name) and not name.startswith(OUR_PREFIX) and tensor.dtype in dtypes
        found = tensors.put(tensor, name if as_it_is else f"{OUR_PREFIX}model/{len(model)}")
        model.append(name if found == {"$tensor": name} else [name, found])
    extras = Extras(
        history=checkpoint.history,
        plan=checkpoint.plan,
        lifecycle={} if checkpoint.has_no_rows else checkpoint.lifecycle,
        deleted=tuple(sorted(checkpoint.head.deleted)) if checkpoint.head else (),
        dialects=dict(checkpoint.origin.dialects),
    )
    document: dict[str, Any] = {
        "version": 1,
        "model": model,
        "metadata": _encode(checkpoint.metadata, "metadata", tensors),
        "payload": _encode(checkpoint.payload, "payload", tensors),
        "param_names": None if checkpoint.param_names is None else list(checkpoint.param_names),
        "optimizer": None,
        "extras": _encode(extras.as_json(), "extras", tensors),
    }
    if checkpoint.optimizer is not None:
        optimizer = checkpoint.optimizer
        groups = [
            {
                "options": _encode(group.options, f"optimizer/group_{number}", tensors),
                "params": list(group.params),
                "keys": list(group.keys),
            }
            for number, group in enumerate(optimizer.groups)
        ]
        document["optimizer"] = {
            "groups": groups,
            "state": _encode(optimizer.state, "optimizer", tensors),
            "extra": _encode(optimizer.extra, "optimizer", tensors),
        }
        if optimizer.undecided:
            document["optimizer"]["undecided"] = sorted(optimizer.undecided)
        if any(optimizer.prefixes):
            document["optimizer"]["prefixes"] = list(optimizer.prefixes)
    return tensors.by_name, document


def document_text(document: Mapping[str, Any]) -> str:
    """Return a document as JSON text, in ASCII and without spaces.

    Raises:
        LimitError: it holds a whole number of thousands of digits.
    """
    try:
        return json.dumps(document, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise LimitError("holds a whole number of thousands of digits") from error


class _Stored:
    """The tensors to store; what is one tensor gets one name, whatever stands there twice."""

    def __init__(self, dtypes: Collection[torch.dtype], is_name: Callable[[str], bool]) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._dtypes = dtypes
        self._is_name = is_name
        self._known: dict[Any, str] = {}

    def put(self, tensor: Tensor, wanted: str) -> dict[str, Any]:
        """Store a tensor, under `wanted` if that is free; return what refers to it."""
        view = view_of(tensor)
        name = self._known.get(view) if tensor.numel() else None
        native = tensor.dtype in self._dtypes
        if name is None:
            name = self._free(wanted)
            self._known[view] = name
            self.by_name[name] = tensor if native else bytes_of(tensor)
        found: dict[str, Any] = {"$tensor": name}
        if not native:
            found |= {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        if isinstance(tensor, nn.Parameter):
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


def _encode(value: Any, place: str, tensors: _Stored) -> Any:
    """Return a plain value as JSON; `place` names the tensors in it."""
    if isinstance(value, Tensor):
        return tensors.put(value, OUR_PREFIX + place)
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": struct.pack(">d", value).hex()}
    if isinstance(value, list | tuple):
        entries = [_encode(entry, f"{place}/{i}", tensors) for i, entry in enumerate(value)]
        return {"$tuple": entries} if isinstance(value, tuple) else entries
    if isinstance(value, dict):
        pairs = [[key, _encode(entry, f"{place}/{key}"[:_PLACE], tensors)] for key, entry in value.items()]
        if isinstance(value, OrderedDict):
            found: dict[str, Any] = {"$ordered": pairs}
            if vars(value):
                found["attributes"] = _encode(vars(value), place, tensors)
            return found
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$dict": pairs}
    return value


# --- load ---


def load_document(tensors: Mapping[str, Tensor], document: Any, path: Path, format_name: str) -> Checkpoint:
    """Put a checkpoint together again; the inverse of `dump_document`.

    Args:
        tensors: by the names they are stored under.
        document: parsed JSON.
        path: named in errors, and the checkpoint's origin.
        format_name: the adapter's.

    Raises:
        InconsistentError: the document is none, or does not fit the tensors.
        UnsupportedError: a newer version wrote it.
        LimitError: it is nested too deeply, or holds too much.
    """
    with errors_at(path):
        checkpoint = _load(tensors, document, path, format_name)
        optimizer = checkpoint.optimizer
        trained = [optimizer.state, optimizer.extra, *(g.options for g in optimizer.groups)] if optimizer else []
        for value in (checkpoint.payload, checkpoint.metadata, *trained):
            check_plain(value)
    return checkpoint


def _load(tensors: Mapping[str, Tensor], document: Any, path: Path, format_name: str) -> Checkpoint:
    refuse_newer(document)
    try:
        parsed = _Document.model_validate(document)
    except ValidationError as error:
        first = refusals(error, _Document)[0]
        raise InconsistentError(first.what, key=".".join(map(str, (OUR_KEY, *first.place)))[:200]) from None
    decoder = _Decoder(tensors)
    entries = [(entry, {"$tensor": entry}) if isinstance(entry, str) else entry for entry in parsed.model]
    core: dict[str, Tensor] = {}
    for name, found in entries:
        tensor = decoder.decode(found, f"model.{name}")
        if not isinstance(tensor, Tensor) or name in core:
            raise InconsistentError("is no tensor, or stands there twice", key=f"model.{name}")
        core[name] = tensor
    payload, metadata = decoder.decode(parsed.payload, "payload"), decoder.decode(parsed.metadata, "model._metadata")
    if type(payload) is not dict or not isinstance(metadata, dict | None):
        raise InconsistentError("its payload or _metadata is no dict", key=OUR_KEY)
    if not all(isinstance(entry, dict) for entry in (metadata or {}).values()):
        raise InconsistentError("must hold a dict for each module", key="model._metadata")
    extras = parse_extras(decoder.decode(parsed.extras, "extras"))
    optimizer = _load_optimizer(parsed.optimizer, decoder) if parsed.optimizer else None
    if unused := sorted(tensors.keys() - decoder.used):
        raise InconsistentError("is a tensor that the metadata does not know", key=unused[0])
    checkpoint = Checkpoint(
        core=core,
        optimizer=optimizer,
        payload=payload,
        param_names=None if parsed.param_names is None else tuple(parsed.param_names),
        metadata=metadata,
        plan=extras.plan,
        history=extras.history,
        origin=Origin(format_name, path, extras.dialects),
    )
    found = split_head(checkpoint, path, frozenset(extras.deleted))
    rows = {i: Lifecycle.unknown(found.step) for i in range(found.num_experts)}
    return replace(found, lifecycle=extras.lifecycle or rows)


def _load_optimizer(parsed: _Optimizer, decoder: _Decoder) -> Optimizer:
    state, extra = decoder.decode(parsed.state, "optimizer.state"), decoder.decode(parsed.extra, "optimizer")
    if not isinstance(state, dict) or not isinstance(extra, dict) or extra.keys() & {"state", "param_groups"}:
        raise InconsistentError("its state or what stands beside it is no dict of its own", key="optimizer")
    if not all(isinstance(name, str) and isinstance(slots, dict) for name, slots in state.items()):
        raise InconsistentError("its state must hold a dict for each name", key="optimizer")
    groups = []
    for group in parsed.groups:
        options = decoder.decode(group.options, "optimizer.param_groups")
        if not isinstance(options, dict) or options.keys() & {"params", "param_names"}:
            raise InconsistentError("the options of a param group are no dict of their own", key="optimizer")
        groups.append(ParamGroup(options, group.params, tuple(group.keys)))
    return Optimizer(groups, state, extra, undecided=frozenset(parsed.undecided), prefixes=parsed.prefixes)


class _Decoder:
    """Turns JSON back into plain values; remembers which stored tensors were used."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.used: set[str] = set()
        # An empty one may have come with strides that have no view as another dtype.
        self._tensors = {n: t if t.numel() else torch.empty(t.shape, dtype=t.dtype) for n, t in tensors.items()}
        self._made: dict[str, Tensor] = {}

    def decode(self, value: Any, place: str, depth: int = 0) -> Any:
        if depth > DEEPEST:
            raise LimitError(f"is nested deeper than {DEEPEST}", key=place)
        if isinstance(value, list):
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
            raise InconsistentError(f"is no {special[:_PLACE]} of ours: {error}", key=place) from error

    def _special(self, kind: str, value: dict[str, Any], place: str, depth: int) -> Any:
        inside = value[kind]
        if kind == "$tensor":
            return self._tensor(value, place)
        if kind == "$ordered" and value.keys() <= {kind, "attributes"}:
            ordered = OrderedDict(self._pairs(inside, place, depth))
            attributes = self.decode(value.get("attributes", {}), place, depth + 1)
            if not isinstance(attributes, dict) or any(hasattr(OrderedDict, name) for name in attributes):
                raise ValueError("its attributes are not those of a dict")
            vars(ordered).update(attributes)
            return ordered
        if len(value) != 1:
            raise ValueError("it has further entries")
        if kind == "$dict":
            return dict(self._pairs(inside, place, depth))
        if kind == "$tuple" and isinstance(inside, list):
            return tuple(self.decode(inside, place, depth))
        if kind == "$float":
            return struct.unpack(">d", bytes.fromhex(inside))[0]
        raise ValueError("there is no such kind")

    def _pairs(self, pairs: Any, place: str, depth: int) -> list[tuple[Any, Any]]:
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ValueError("it must list pairs of key and value")
        if not all(type(key) in (str, int) for key, _ in pairs) or len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key is neither text nor a number, or stands there twice")
        return [(key, self.decode(entry, f"{place}.{key}"[:_PLACE], depth + 1)) for key, entry in pairs]

    def _tensor(self, found: dict[str, Any], place: str) -> Tensor:
        if not found.keys() <= {"$tensor", "dtype", "shape", "parameter", "requires_grad"}:
            raise ValueError("it has further entries")
        name = found["$tensor"]
        if name not in self._tensors:
            raise InconsistentError(f"refers to a tensor {name!r} that is not there", key=place)
        self.used.add(name)
        key = json.dumps(found)
        if key not in self._made:  # what is one tensor stays one
            if not all(type(found.get(flag, True)) is bool for flag in ("parameter", "requires_grad")):
                raise ValueError("it must say true or false")
            foreign = "dtype" in found or "shape" in found
            tensor = self._from_bytes(name, found["dtype"], found["shape"]) if foreign else self._tensors[name]
            if "parameter" in found:
                tensor = nn.Parameter(tensor, found["parameter"])
            elif found.get("requires_grad"):
                tensor = tensor.detach().requires_grad_()
            self._made[key] = tensor
        return self._made[key]

    def _from_bytes(self, name: str, dtype_name: str, shape: list[int]) -> Tensor:
        """Return a tensor of a dtype that the format does not know, from the bytes it is stored as."""
        tensor, dtype = self._tensors[name], _DTYPES[dtype_name]
        if tensor.dtype != torch.uint8 or tensor.ndim != 1 or dtype_name.startswith(_QUANTISED):
            raise ValueError("it is not stored as bytes")
        if not _is_shape(shape):
            raise ValueError("it has no shape")
        if tensor.data_ptr() % dtype.itemsize:  # bytes may lie at odd places, where not every operation may read
            tensor = self._tensors[name] = tensor.clone()
        return tensor.view(dtype).view(shape)


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MOST_DIMENSIONS
        and all(type(size) is int and size >= 0 for size in value)
        and math.prod(size or 1 for size in value) <= _MOST_ELEMENTS
    )


def from_state_dict(tensors: Mapping[str, Tensor], path: Path, format_name: str) -> Checkpoint:
    """Make a checkpoint of a state dict that came without a document.

    Formats sort tensors as they like, so their order means nothing: the head's are put together, its experts by id,
    where the first of them stood.

    Raises:
        InconsistentError: a tensor has a name of ours, so its document was lost.
    """
    if ours := [name for name in tensors if name.startswith(OUR_PREFIX)]:
        raise InconsistentError(
            "is training state, but the metadata that belongs to it was lost",
            path=path,
            key=ours[0],
            hint="some tool has rewritten the file; take the original",
        )
    head = sorted((name for name in tensors if name.startswith((VRAXION.single, VRAXION.experts))), key=_expert_id)
    known = set(head)
    others = [name for name in tensors if name not in known]
    position = next((place for place, name in enumerate(tensors) if name in known), 0)
    order = [*others[:position], *head, *others[position:]]
    origin = origin_of_state_dict(Origin(format_name, path))
    checkpoint = Checkpoint({name: tensors[name] for name in order}, origin=origin)
    found = split_head(checkpoint, path)
    return replace(found, lifecycle={i: Lifecycle.unknown(0) for i in range(found.num_experts)})


def _expert_id(name: str) -> int:
    expert = name.removeprefix(VRAXION.experts).partition(".")[0]
    return int(expert) if expert.isdecimal() and len(expert) < 10 else -1  # any other is refused by `split_head`
