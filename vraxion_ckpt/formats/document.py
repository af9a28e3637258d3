"""A checkpoint as named tensors and one JSON document, for formats that hold only tensors and text.

The tensors of the model keep their names in the state dict. All other tensors, such as the optimizer's, get names that
begin with `OUR_PREFIX`. So do tensors of the model whose name or dtype the format cannot hold. A tensor of such a dtype
is stored as bytes. Aliased tensors are stored once. The document refers to the tensors by name and holds everything
else: training state, param groups, lifecycle rows, history, format variants. `vraxion_ckpt.formats.document_values`
describes the encoding of values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, OptimizerForm, OptimizerPart, ParamGroup
from vraxion_ckpt.checkpoint.plain_data import check_plain, dtype_name
from vraxion_ckpt.checkpoint.provenance import Origin
from vraxion_ckpt.checkpoint.references import TensorRef, as_reference
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict, packed, referenced, resolved
from vraxion_ckpt.errors import InconsistentError, LimitError, errors_at
from vraxion_ckpt.formats.document_values import TensorStore, ValueDecoder, encode_value
from vraxion_ckpt.formats.extras import OUR_KEY, OUR_PREFIX, Extras, parse_extras, refuse_newer
from vraxion_ckpt.formats.state_dict import prefix_to_record, split_head
from vraxion_ckpt.support.model_errors import refusals

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid")

    options: Any
    params: list[str]
    keys: list[str]
    part: int = 0


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    place: list[str | int] = []
    form: OptimizerForm = OptimizerForm.NUMBERED
    prefixes: tuple[str, str] = ("", "")
    listed: tuple[str, str] | None = None
    keys: list[str] = []


class _Optimizer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    groups: list[_Group]
    state: Any
    extra: Any
    undecided: list[str] = []
    prefixes: tuple[str, str] = ("", "")
    parts: list[_Part] = []


class _Document(BaseModel):
    """The entries of a document.

    Attributes:
        model: the entries of the state dict in order. An entry is the tensor's name if the tensor is stored unchanged
            under this name, otherwise a pair of the name and the JSON that refers to the stored tensor.
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
    checkpoint: Checkpoint, dtypes: Collection[torch.dtype | str], is_name: Callable[[str], bool]
) -> tuple[TensorDict[str, Tensor], dict[str, Any]]:
    """Return a checkpoint as named tensors and a document.

    Args:
        checkpoint: the checkpoint; its optimizer is bound.
        dtypes: the dtypes that the format can hold, or their names, ``uint8`` among them.
        is_name: a function that tells whether the format accepts a name for a tensor.

    Returns:
        the tensors to store by name, and the document. Each tensor has one of `dtypes`; it may be non-contiguous.
    """
    names = frozenset(map(dtype_name, dtypes))
    tensors = TensorStore(names, is_name)
    model: list[Any] = []
    state = checkpoint.state_references()
    for name, tensor in state.items():
        # Bytes stored under the name of a tensor would look like the tensor to programs that ignore the document.
        as_it_is = is_name(name) and not name.startswith(OUR_PREFIX) and tensor.dtype in names
        found = tensors.put(tensor, name if as_it_is else f"{OUR_PREFIX}model/{len(model)}")
        model.append(name if found == {"$tensor": name} else [name, found])
    extras = Extras(
        history=checkpoint.history,
        plan=checkpoint.plan,
        lifecycle={} if checkpoint.has_no_rows else checkpoint.lifecycle,
        deleted=tuple(sorted(checkpoint.head.deleted)) if checkpoint.head else (),
        head_prefix=prefix_to_record(checkpoint, state.keys()),
        dialects=dict(checkpoint.origin.dialects),
    )
    document = {
        "version": 1,
        "model": model,
        "metadata": encode_value(checkpoint.metadata, "metadata", tensors),
        "payload": encode_value(checkpoint.payload.references(), "payload", tensors),
        "param_names": None if checkpoint.param_names is None else list(checkpoint.param_names),
        "optimizer": None if checkpoint.optimizer is None else _dump_optimizer(checkpoint.optimizer, tensors),
        "extras": encode_value(extras.as_json(), "extras", tensors),
    }
    return TensorDict(tensors.by_name), document


def _dump_optimizer(optimizer: Optimizer, tensors: TensorStore) -> dict[str, Any]:
    dumped: dict[str, Any] = {
        "groups": [
            {
                "options": encode_value(referenced(group.options), f"optimizer/group_{number}", tensors),
                "params": list(group.params),
                "keys": list(group.keys),
                **({"part": group.part} if group.part else {}),
            }
            for number, group in enumerate(optimizer.groups)
        ],
        "state": encode_value(optimizer.state.references(), "optimizer", tensors),
        "extra": encode_value(optimizer.extra.references(), "optimizer", tensors),
    }
    if optimizer.undecided:
        dumped["undecided"] = sorted(optimizer.undecided)
    if len(optimizer.parts) == 1 and optimizer.parts[0] == OptimizerPart(prefixes=optimizer.parts[0].prefixes):
        if any(optimizer.parts[0].prefixes):
            dumped["prefixes"] = list(optimizer.parts[0].prefixes)
    else:
        dumped["parts"] = [_dump_part(part) for part in optimizer.parts]
    return dumped


def _dump_part(part: OptimizerPart) -> dict[str, Any]:
    found = _Part(
        place=list(part.place), form=part.form, prefixes=part.prefixes, listed=part.listed, keys=list(part.keys)
    )
    return found.model_dump(mode="json", exclude_defaults=True)


def document_text(document: Mapping[str, Any]) -> str:
    """Return a document as JSON text, in ASCII and without spaces.

    Raises:
        LimitError: the document has a number with thousands of digits.
    """
    try:
        return json.dumps(document, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise LimitError("has a number with thousands of digits") from error


# --- load ---


def load_document(tensors: Mapping[str, Tensor | TensorRef], document: Any, path: Path, format_name: str) -> Checkpoint:
    """Return the checkpoint that is stored as tensors and a document; the inverse of `dump_document`.

    Args:
        tensors: the stored tensors, or references, by name.
        document: the document, as parsed JSON.
        path: the file or directory, for errors and for the checkpoint's origin.
        format_name: the name of the adapter.

    Raises:
        InconsistentError: the document is not valid, or does not fit the tensors.
        UnsupportedError: a newer version of this package has written it.
        LimitError: the document is nested too deeply, or has too many values.
    """
    with errors_at(path):
        references = {name: as_reference(tensor) for name, tensor in tensors.items()}
        checkpoint = _load(references, document, path, format_name)
        optimizer = checkpoint.optimizer
        trained = [optimizer.state, optimizer.extra, *(g.options for g in optimizer.groups)] if optimizer else []
        for value in (checkpoint.payload, checkpoint.metadata, *trained):
            check_plain(value)
    return checkpoint


def _load(tensors: Mapping[str, TensorRef], document: Any, path: Path, format_name: str) -> Checkpoint:
    refuse_newer(document)
    try:
        parsed = _Document.model_validate(document)
    except ValidationError as error:
        first = refusals(error, _Document)[0]
        raise InconsistentError(first.what, key=".".join(map(str, (OUR_KEY, *first.place)))[:200]) from None
    decoder = ValueDecoder(tensors)
    entries = [(entry, {"$tensor": entry}) if isinstance(entry, str) else entry for entry in parsed.model]
    core: dict[str, TensorRef] = {}
    for name, found in entries:
        tensor = decoder.decode(found, f"model.{name}")
        if not isinstance(tensor, TensorRef) or name in core:
            raise InconsistentError("is not a tensor, or occurs twice", key=f"model.{name}")
        core[name] = tensor
    payload, metadata = decoder.decode(parsed.payload, "payload"), decoder.decode(parsed.metadata, "model._metadata")
    if type(payload) is not dict or not isinstance(metadata, dict | None):
        raise InconsistentError("its `payload` or `metadata` is not a dict", key=OUR_KEY)
    if not all(isinstance(entry, dict) for entry in (metadata or {}).values()):
        raise InconsistentError("must hold a dict for each module", key="model._metadata")
    extras = parse_extras(decoder.decode(parsed.extras, "extras"))
    optimizer = _load_optimizer(parsed.optimizer, decoder) if parsed.optimizer else None
    if unused := sorted(tensors.keys() - decoder.used):
        raise InconsistentError("is a tensor that the metadata does not list", key=unused[0])
    checkpoint = Checkpoint(
        core=TensorDict(core),
        optimizer=optimizer,
        payload=TensorDict(packed(payload)),
        param_names=None if parsed.param_names is None else tuple(parsed.param_names),
        metadata=metadata,
        plan=extras.plan,
        history=extras.history,
        origin=Origin(format_name, path, extras.dialects),
    )
    found = split_head(checkpoint, path, frozenset(extras.deleted), extras.head_prefix)
    rows = {i: Lifecycle.unknown(found.step) for i in range(found.num_experts)}
    return replace(found, lifecycle=extras.lifecycle or rows)


def _load_optimizer(parsed: _Optimizer, decoder: ValueDecoder) -> Optimizer:
    state, extra = decoder.decode(parsed.state, "optimizer.state"), decoder.decode(parsed.extra, "optimizer")
    if not isinstance(state, dict) or not isinstance(extra, dict) or extra.keys() & {"state", "param_groups"}:
        message = "its `state` and `extra` must be dicts, and `extra` must not have `state` or `param_groups`"
        raise InconsistentError(message, key="optimizer")
    if not all(isinstance(name, str) and isinstance(slots, dict) for name, slots in state.items()):
        raise InconsistentError("its state must hold a dict for each name", key="optimizer")
    groups = []
    for group in parsed.groups:
        options = resolved(decoder.decode(group.options, "optimizer.param_groups"))
        if not isinstance(options, dict) or options.keys() & {"params", "param_names"}:
            message = "the options of a param group must be a dict without `params` and `param_names`"
            raise InconsistentError(message, key="optimizer")
        groups.append(ParamGroup(options, group.params, tuple(group.keys), group.part))
    parts = tuple(
        OptimizerPart(tuple(part.place), part.form, part.prefixes, part.listed, tuple(part.keys))
        for part in parsed.parts
    )
    return Optimizer(
        groups,
        TensorDict(state),
        TensorDict(extra),
        undecided=frozenset(parsed.undecided),
        parts=parts or (OptimizerPart(prefixes=parsed.prefixes),),
    )
