"""Convert the payload dict of a trainer to the canonical checkpoint and back.

A ``.pt`` monolith and the ``router.state`` of a modular directory each hold one dict with the model, the optimizer, and
training state. Its keys depend on the trainer, see `vraxion_ckpt.checkpoint.dialects`. `Extras` are stored under
`OUR_KEY`, which trainers ignore. In a bare state dict they are stored in ``_metadata``, which torch ignores.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vraxion_ckpt.checkpoint.dialects import Dialect, most_specific
from vraxion_ckpt.checkpoint.model import Checkpoint, UnboundCheckpoint
from vraxion_ckpt.checkpoint.provenance import Origin
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict, packed, referenced, resolved
from vraxion_ckpt.checkpoint.torch_optimizer import as_unbound, digest
from vraxion_ckpt.errors import BindingError, InconsistentError, UnsupportedError, errors_at
from vraxion_ckpt.formats.extras import OUR_KEY, Extras, parse_extras
from vraxion_ckpt.formats.optimizer_forms import find_optimizers, with_optimizers
from vraxion_ckpt.formats.payload_dialect import PayloadDialect
from vraxion_ckpt.optimizer.binding import bind
from vraxion_ckpt.optimizer.parameter_names import names_in_payload
from vraxion_ckpt.wording import listed

if TYPE_CHECKING:
    from torch import Tensor

# For adapters that pass no dialects.
_USUAL = (Dialect("", model_key="model", optimizer_keys=("optim", "optimizer")),)
_MOST_LISTED = 8  # keys of a payload in a message


@dataclass
class Parsed:
    """A parsed payload dict. The head is not separated yet; `split_head` does that.

    Attributes:
        checkpoint: the checkpoint. Its `core` is the whole state dict, in order.
        num_experts: the payload's entry ``num_experts``; None if there is none.
        dialect: the dialect of the payload.
        extras: the extras in the payload.
    """

    checkpoint: Checkpoint
    num_experts: int | None
    dialect: PayloadDialect
    extras: Extras


def parse_payload(
    payload: Any,
    path: Path,
    dialects: Sequence[Dialect] = _USUAL,
    *,
    model_key: str | None = None,
    optimizer_key: str | None = None,
) -> Parsed:
    """Parse a payload dict with tensors or references.

    Args:
        payload: the dict.
        path: its file, for errors.
        dialects: the declared dialects, which tell under which keys model and optimizer are.
        model_key: the key of the model, if the user names it. No dialect is used then.
        optimizer_key: the key of the optimizer, if the user names it.

    Raises:
        InconsistentError: it is not a dict, has no model that a dialect knows, or has entries of the wrong type.
        UnsupportedError: its state dict holds values other than tensors, or a newer version has written its extras.
    """
    with errors_at(path):
        return _parse(referenced(payload), dialects or _USUAL, model_key, optimizer_key)


def _parse(payload: Any, dialects: Sequence[Dialect], named_model: str | None, named_optimizer: str | None) -> Parsed:
    if not isinstance(payload, dict):
        kind = "Tensor" if isinstance(payload, TensorRef) else type(payload).__name__
        raise InconsistentError(f"holds a {kind}, not a dict")
    bare = bool(payload) and all(isinstance(value, TensorRef) for value in payload.values())
    ours = payload.get(OUR_KEY)
    if isinstance(ours, dict) and not bare:
        named_model, named_optimizer = (
            named_model or ours.get("model_key"),
            named_optimizer or ours.get("optimizer_key"),
        )
    model_key = "model" if bare else _model_key(payload, dialects, named_model)
    state = payload if bare else payload[model_key]
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise InconsistentError("a state dict's keys must be text", key=f"{model_key}[{name!r}]")
        if not isinstance(tensor, TensorRef):
            raise UnsupportedError(f"is a {type(tensor).__name__}, not a tensor", key=f"{model_key}.{name}")
    if not all(isinstance(key, str) for key in payload):
        raise InconsistentError("the payload's keys must be text")

    metadata, extras = _metadata_and_extras(state, payload, bare)
    if named_optimizer is not None and named_optimizer not in payload:
        raise InconsistentError(f"has no key {named_optimizer!r}", hint=_holds(payload))
    usual = dict.fromkeys(key for dialect in dialects for key in dialect.optimizer_keys)
    optimizer_keys = [named_optimizer] if named_optimizer is not None else [*usual]
    held = find_optimizers({} if bare else payload, optimizer_keys, {model_key, "param_names", OUR_KEY})
    layout = PayloadDialect(
        bare=bare,
        ordered=isinstance(state, OrderedDict) and not (bare and metadata is None and extras != Extras()),
        optimizer_key=held.key,
        keys=() if bare else tuple(key for key in payload if key != OUR_KEY),
        model_key=model_key,
        named=not bare and (named_model is not None or named_optimizer is not None),
    )
    fields: dict[str, Any] = {
        "core": TensorDict(state),
        "payload": TensorDict(packed({key: value for key, value in held.entries.items() if key != held.key})),
        "param_names": None if bare else names_in_payload(payload.get("param_names")),
        "metadata": metadata,
        "plan": extras.plan,
        "history": extras.history,
    }
    if held.unbound is None:
        checkpoint = Checkpoint(**fields)
    else:
        unbound = replace(
            held.unbound,
            names=extras.optimizer_names,
            digest=extras.optimizer_digest,
            undecided=frozenset(extras.optimizer_undecided),
        )
        checkpoint = UnboundCheckpoint(**fields, unbound=unbound)
    return Parsed(checkpoint, None if bare else _stated_experts(payload), layout, extras)


def _model_key(payload: dict[Any, Any], dialects: Sequence[Dialect], named: str | None) -> str:
    """Return the key of the model in a payload that is not a bare state dict."""
    if named is not None:
        if not isinstance(payload.get(named), dict):
            raise InconsistentError(f"has no dict {named!r}", hint=_holds(payload))
        return named
    found = most_specific(dialects, payload)
    if not found:
        raise InconsistentError(
            "no dialect recognises a model in it, and it is not a bare state dict",
            hint=f"{_holds(payload)}; name the keys, as in --from pt:model_key=KEY,optimizer_key=KEY",
        )
    models = list(dict.fromkeys(dialect.model_key for dialect in found))
    if len(models) > 1:
        raise InconsistentError(
            f"may hold its model under {' or '.join(map(repr, models))}",
            hint=f"name the key, as in --from pt:model_key={models[0]}",
        )
    return models[0]


def _holds(payload: Mapping[Any, Any]) -> str:
    """Return the keys of a payload and what is under them, for hints."""
    held = [f"{key} ({type(value).__name__})" for key, value in payload.items()]
    return f"it holds {listed(held, _MOST_LISTED)}" if held else "it holds nothing"


def _stated_experts(payload: dict[str, Any]) -> int | None:
    stated = payload.get("num_experts")
    if stated is not None and (type(stated) is not int or stated < 1):
        raise InconsistentError(f"must be an integer ≥ 1, not {stated!r}", key="num_experts")
    return stated


def _metadata_and_extras(
    state: dict[str, Any], payload: dict[str, Any], bare: bool
) -> tuple[dict[str, Any] | None, Extras]:
    metadata = getattr(state, "_metadata", None)
    if metadata is not None and not isinstance(metadata, dict):
        raise InconsistentError("must be a dict", key="model._metadata")
    for module, entry in (metadata or {}).items():
        if not isinstance(entry, dict):
            raise InconsistentError("must be a dict", key=f"model._metadata[{module!r}]")
    others = sorted({*vars(state)} - {"_metadata"}) if isinstance(state, OrderedDict) else []
    if others or (not bare and isinstance(payload, OrderedDict) and vars(payload)):
        raise UnsupportedError("has Python attributes, which would be lost", key=(others or ["payload"])[0])
    metadata = dict(metadata) if metadata is not None else None
    raw = payload.get(OUR_KEY) if not bare else None
    if bare and metadata and OUR_KEY in metadata:
        raw = metadata.pop(OUR_KEY)
        metadata = metadata or None
    return metadata, Extras() if raw is None else parse_extras(raw)


def build_payload(
    checkpoint: Checkpoint, state: Mapping[str, Tensor | TensorRef], dialect: PayloadDialect, extras: Extras
) -> dict[str, Any]:
    """Return the payload dict of `build_payload_references` with tensors instead of references."""
    payload: dict[str, Any] = resolved(build_payload_references(checkpoint, state, dialect, extras))
    return payload


def build_payload_references(
    checkpoint: Checkpoint, state: Mapping[str, Tensor | TensorRef], dialect: PayloadDialect, extras: Extras
) -> dict[str, Any]:
    """Return a payload dict with a reference for each tensor; the inverse of `parse_payload`.

    Args:
        checkpoint: the checkpoint from which everything except the model's tensors is taken.
        state: the tensors of the model, or references, by name.
        dialect: the dialect to write. Entries whose keys it does not list come last, in the order of the payload.
        extras: the value to store under `OUR_KEY`. It is not stored if all its fields have their defaults.
    """
    ours = extras.as_json()
    if ours:
        ours = {"version": extras.version, **ours}
    metadata = dict(checkpoint.metadata) if checkpoint.metadata is not None else None
    if dialect.bare and ours:
        metadata = {**(metadata or {}), OUR_KEY: ours}
    model: dict[str, TensorRef] = referenced(state)
    if metadata is not None or dialect.ordered:
        model = OrderedDict(model)
    if metadata is not None:
        model._metadata = OrderedDict(referenced(metadata))  # type: ignore[attr-defined]  # as Module.state_dict does
    if dialect.bare:
        return model
    entries: dict[str, Any] = {dialect.model_key: model, **checkpoint.payload.references()}
    if checkpoint.head is not None:
        entries["num_experts"] = checkpoint.num_experts
    entries = with_optimizers(entries, checkpoint.optimizer, dialect.optimizer_key)
    if checkpoint.param_names is not None:
        entries["param_names"] = list(checkpoint.param_names)
    new = [key for key in entries if key not in (*dialect.keys, "num_experts", "param_names")]
    if ours:
        entries[OUR_KEY] = ours
        new.append(OUR_KEY)
    return {key: entries[key] for key in (*dialect.keys, *new) if key in entries}


def make_extras(checkpoint: Checkpoint, dialect: PayloadDialect, origin: Origin, **more: Any) -> Extras:
    """Return the extras to write into a payload.

    Args:
        checkpoint: the checkpoint.
        dialect: the dialect of the payload.
        origin: the origin to record in the payload; only its dialects are stored.
        more: further fields of `Extras`.
    """
    names = _names_to_record(checkpoint, dialect)
    keys = {"model_key": dialect.model_key, "optimizer_key": dialect.optimizer_key} if dialect.named else {}
    return Extras(history=checkpoint.history, plan=checkpoint.plan, dialects=origin.dialects, **names, **keys, **more)


def _names_to_record(checkpoint: Checkpoint, dialect: PayloadDialect) -> dict[str, Any]:
    """Return the fields of `Extras` with the optimizer's parameter names. Empty if `bind` finds the names itself."""
    if checkpoint.optimizer is None:
        return {}
    names, undecided = checkpoint.optimizer.params, checkpoint.optimizer.undecided
    unbound = as_unbound(checkpoint.optimizer)
    as_written = checkpoint.with_unbound(unbound)
    as_written.param_names = checkpoint.param_names if "param_names" in dialect.keys else None
    try:
        found = bind(as_written).optimizer
    except BindingError:
        found = None
    if found is not None and found.params == names and found.undecided == undecided:
        return {}
    return {
        "optimizer_names": tuple(names),
        "optimizer_digest": digest(unbound.state_dict),
        "optimizer_undecided": tuple(sorted(undecided)),
    }
