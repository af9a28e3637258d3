"""The payload dict of VRAXION's checkpoints ↔ the canonical checkpoint.

A ``.pt`` monolith and a modular directory's ``router.state`` both hold one dict: the model, the optimizer, and
training state under keys that differ from trainer to trainer. Its dialect is remembered, so that it is written
back as its own trainer knows it. What the dict has no customary place for goes under one key of ours, which trainers
ignore; a bare state dict has room only in its ``_metadata``, where torch ignores it.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
from vraxion_ckpt.checkpoint.head_names import VRAXION
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle, SplitPlan, UnboundCheckpoint
from vraxion_ckpt.checkpoint.optimizer_state import UnboundOptimizer
from vraxion_ckpt.checkpoint.provenance import Origin, Record
from vraxion_ckpt.checkpoint.torch_optimizer import digest, unbind
from vraxion_ckpt.errors import BindingError, InconsistentError, UnsupportedError, errors_at
from vraxion_ckpt.optimizer.binding import bind
from vraxion_ckpt.optimizer.parameter_names import names_in_payload
from vraxion_ckpt.support.model_errors import refusals

OUR_KEY = "vraxion_ckpt"
_OPTIMIZER_KEYS = ("optim", "optimizer")


@dataclass(frozen=True)
class PayloadDialect:
    """How one payload dict is spelt.

    Attributes:
        bare: the dict is the state dict itself.
        ordered: the state dict is an OrderedDict, as ``Module.state_dict()`` returns it.
        optimizer_key: ``optim``, ``optimizer``, or None where there is none.
        keys: every key in order.
    """

    bare: bool = False
    ordered: bool = False
    optimizer_key: str | None = None
    keys: tuple[str, ...] = ("model",)

    def as_router(self) -> PayloadDialect:
        """Return the dialect in which a modular directory's trainer writes the same payload."""
        keys = [key if key != self.optimizer_key else "optim" for key in ("model",) * self.bare + self.keys]
        keys += [key for key in ("num_experts", "param_names") if key not in keys]
        return replace(self, bare=False, optimizer_key=self.optimizer_key and "optim", keys=tuple(keys))

    def implies(self, router: PayloadDialect, has_head: bool) -> bool:
        """Tell whether `router` is just how a modular trainer would spell this, as far as there is a value to spell."""
        unknown = {"param_names"} if has_head else {"param_names", "num_experts"}
        known = tuple(key for key in self.as_router().keys if key not in unknown or key in router.keys)
        return replace(self.as_router(), keys=known) == router

    def __str__(self) -> str:
        if self.bare:
            return "a bare state dict"
        return f"a payload dict of {', '.join(self.keys)}"


_DIALECT = TypeAdapter(PayloadDialect)


class Extras(BaseModel):
    """What we keep under our own key; absent where everything has its default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    history: tuple[Record, ...] = ()
    plan: SplitPlan | None = None
    lifecycle: dict[int, Lifecycle] = {}
    deleted: tuple[int, ...] = ()
    head_position: int | None = None
    optimizer_names: tuple[str, ...] | None = None
    optimizer_digest: str | None = None
    optimizer_undecided: tuple[str, ...] = ()
    dialects: dict[str, Any] = {}

    def as_json(self) -> dict[str, Any]:
        """Return what differs from the defaults, in type and in bits: a 0 that stands for 0.0 is kept."""
        found = self.model_dump(mode="json", exclude_defaults=True)
        for i, row in self.lifecycle.items():
            entries = {
                name: value for name, value in vars(row).items() if repr(value) != repr(getattr(_ROW, name, None))
            }
            found["lifecycle"][str(i) if str(i) in found["lifecycle"] else i] = {
                name: dict(value) if isinstance(value, Mapping) else value for name, value in entries.items()
            }
        return found


_ROW = Lifecycle()


@dataclass
class Parsed:
    """A payload dict taken apart: a checkpoint whose head is still to be found, and what belongs to it.

    Attributes:
        checkpoint: its `core` is the whole state dict as it was found.
        num_experts: as the payload states it, or None.
        dialect: how this payload is spelt.
        extras: what stood under our key.
    """

    checkpoint: Checkpoint
    num_experts: int | None
    dialect: PayloadDialect
    extras: Extras


def parse_payload(payload: Any, path: Path) -> Parsed:
    """Take a payload dict apart.

    Raises:
        InconsistentError: not a dict, no model in it, or entries of the wrong type.
        UnsupportedError: a state dict that holds something else than tensors, or extras of a newer version.
    """
    with errors_at(path):
        return _parse(payload)


def _parse(payload: Any) -> Parsed:
    if not isinstance(payload, dict):
        raise InconsistentError(f"holds a {type(payload).__name__}, not a dict")
    bare = bool(payload) and all(isinstance(value, Tensor) for value in payload.values())
    state = payload if bare else payload.get("model")
    if not isinstance(state, dict):
        found = ", ".join(map(repr, list(payload)[:8])) or "nothing"
        raise InconsistentError("has no dict `model` and is no bare state dict", hint=f"it holds {found}")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise InconsistentError("a state dict's keys must be text", key=f"model[{name!r}]")
        if not isinstance(tensor, Tensor):
            raise UnsupportedError(f"is a {type(tensor).__name__}, not a tensor", key=f"model.{name}")
    if not all(isinstance(key, str) for key in payload):
        raise InconsistentError("the payload's keys must be text")

    metadata, extras = _metadata_and_extras(state, payload, bare)
    optimizer_keys = [key for key in _OPTIMIZER_KEYS if key in payload and not bare]
    if len(optimizer_keys) > 1:
        optimizer_keys = [key for key in optimizer_keys if payload[key] is not None]
    if len(optimizer_keys) > 1:
        raise InconsistentError("holds two optimizers, `optim` and `optimizer`")
    optimizer_key = optimizer_keys[0] if optimizer_keys else None
    optimizer = payload[optimizer_key] if optimizer_key else None
    if optimizer is not None and not isinstance(optimizer, dict):
        raise InconsistentError(f"is a {type(optimizer).__name__}, not a dict", key=optimizer_key)
    dialect = PayloadDialect(
        bare=bare,
        ordered=isinstance(state, OrderedDict) and not (bare and metadata is None and extras != Extras()),
        optimizer_key=optimizer_key,
        keys=() if bare else tuple(key for key in payload if key != OUR_KEY),
    )
    own = {"model", "param_names", OUR_KEY, optimizer_key}
    fields: dict[str, Any] = {
        "core": dict(state),
        "payload": {} if bare else {key: value for key, value in payload.items() if key not in own},
        "param_names": None if bare else names_in_payload(payload.get("param_names")),
        "metadata": metadata,
        "plan": extras.plan,
        "history": extras.history,
    }
    if optimizer is None:
        checkpoint = Checkpoint(**fields)
    else:
        names, undecided = extras.optimizer_names, frozenset(extras.optimizer_undecided)
        unbound = UnboundOptimizer(optimizer, names, extras.optimizer_digest, undecided)
        checkpoint = UnboundCheckpoint(**fields, unbound=unbound)
    return Parsed(checkpoint, None if bare else _stated_experts(payload), dialect, extras)


def _stated_experts(payload: dict[str, Any]) -> int | None:
    stated = payload.get("num_experts")
    if stated is not None and (type(stated) is not int or stated < 1):
        raise InconsistentError(f"must be a whole number ≥ 1, not {stated!r}", key="num_experts")
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
        raise UnsupportedError("carries Python attributes, which would be lost", key=(others or ["payload"])[0])
    metadata = dict(metadata) if metadata is not None else None
    raw = payload.get(OUR_KEY) if not bare else None
    if bare and metadata and OUR_KEY in metadata:
        raw = metadata.pop(OUR_KEY)
        metadata = metadata or None
    return metadata, Extras() if raw is None else parse_extras(raw)


def refuse_newer(raw: Any) -> None:
    """Raise `UnsupportedError` for what a newer version wrote."""
    if isinstance(raw, dict) and isinstance(raw.get("version"), int) and raw["version"] > 1:
        raise UnsupportedError(f"was written by a newer vraxion_ckpt (version {raw['version']})", key=OUR_KEY)


def parse_extras(raw: Any) -> Extras:
    """Check what stands under our key.

    Raises:
        InconsistentError: it is not what we write.
        UnsupportedError: a newer version wrote it.
    """
    refuse_newer(raw)
    try:
        json.dumps(raw, allow_nan=False)
        return Extras.model_validate(raw)  # not from the JSON text: half a surrogate pair is a key like any other
    except (TypeError, ValueError, OverflowError) as error:
        if not isinstance(error, ValidationError):
            raise InconsistentError("holds something else than plain JSON", key=OUR_KEY) from error
        first = refusals(error, Extras)[0]
        raise InconsistentError(first.what, key=".".join(map(str, (OUR_KEY, *first.place)))) from None


_EXPERT = re.compile(r"(0|[1-9][0-9]{0,8})\.(.+)")


def split_head(checkpoint: Checkpoint, path: Path, deleted: frozenset[int] = frozenset()) -> Checkpoint:
    """Take the head's tensors out of `core`.

    Raises:
        InconsistentError: both kinds of head, an expert without an id, or head tensors that do not stand together.
    """
    core: dict[str, Tensor] = {}
    single: dict[str, Tensor] = {}
    experts: dict[int, dict[str, Tensor]] = {}
    places: list[int] = []
    order: list[int] = []
    for place, (name, tensor) in enumerate(checkpoint.core.items()):
        if name.startswith(VRAXION.single):
            single[name.removeprefix(VRAXION.single)] = tensor
            places.append(place)
        elif name.startswith(VRAXION.experts):
            found = _EXPERT.fullmatch(name.removeprefix(VRAXION.experts))
            if not found:
                raise InconsistentError("an expert's tensor is called head.experts.<id>.<name>", path=path, key=name)
            experts.setdefault(int(found[1]), {})[found[2]] = tensor
            places.append(place)
            order.append(int(found[1]))
        else:
            core[name] = tensor
    if single and experts:
        raise InconsistentError("holds both head.single.* and head.experts.*", path=path, key="model")
    if not places:
        return replace(checkpoint, core=core)
    runs = 1 + sum(a != b for a, b in pairwise(order))
    if places[-1] - places[0] != len(places) - 1 or (experts and runs != len(experts)):
        raise InconsistentError("the tensors of the head do not stand together", path=path, key="model")
    if single:
        head = Head(HeadKind.SINGLE, {0: Expert(single)}, places[0])
    else:
        head = Head(HeadKind.EXPERTS, {i: Expert(tensors) for i, tensors in experts.items()}, places[0], deleted)
    return with_head(replace(checkpoint, core=core), head)


def with_head(checkpoint: Checkpoint, head: Head) -> Checkpoint:
    """Return the checkpoint with its head; what the payload says of ``num_experts`` now follows from that."""
    payload = {key: value for key, value in checkpoint.payload.items() if key != "num_experts"}
    return replace(checkpoint, head=head, payload=payload)


# Under these names, a checkpoint's origin records how its payload was written in each place that holds one. They are
# in files that were written before, so they stay.
MONOLITH = "pt"
ROUTER = "router"


def origin_of(format_name: str, path: Path, place: str, dialect: PayloadDialect, extras: Extras) -> Origin:
    """Return the origin of a checkpoint that was read from a payload.

    Args:
        format_name: the adapter's name.
        path: what was read.
        place: `MONOLITH` or `ROUTER`, where the payload was found.
        dialect: how the payload was written.
        extras: what was recorded in the payload, the dialects of other formats among it.
    """
    return Origin(format_name, path, extras.dialects).with_dialect(place, _dump(dialect))


def origin_of_state_dict(origin: Origin) -> Origin:
    """Return an origin that says that the checkpoint was a bare state dict."""
    return origin.with_dialect(MONOLITH, _dump(PayloadDialect(bare=True, ordered=True, keys=())))


def recorded_dialect(checkpoint: Checkpoint, place: str) -> PayloadDialect | None:
    """Return the payload dialect that is recorded for `MONOLITH` or `ROUTER`.

    Raises:
        InconsistentError: what is recorded is not a payload dialect.
    """
    raw = checkpoint.origin.dialects.get(place)
    try:
        return _DIALECT.validate_python(raw) if raw is not None else None
    except ValidationError:
        raise InconsistentError("is no payload dialect", key=f"{OUR_KEY}.dialects.{place}") from None


def monolith_dialect(checkpoint: Checkpoint) -> tuple[PayloadDialect, Origin]:
    """Return the dialect in which one file holds the payload, and the origin whose dialects are recorded in it."""
    origin = checkpoint.origin.without_dialects(MONOLITH)
    router = recorded_dialect(checkpoint, ROUTER)
    dialect = recorded_dialect(checkpoint, MONOLITH) or router or PayloadDialect()
    if dialect.bare and (checkpoint.payload or checkpoint.optimizer):
        dialect = router or PayloadDialect(ordered=dialect.ordered)  # it was bare before a trainer added to it
    if router is None or dialect.implies(router, checkpoint.head is not None):
        origin = origin.without_dialects(ROUTER)
    return dialect, origin


def router_dialect(checkpoint: Checkpoint) -> tuple[PayloadDialect, Origin]:
    """Return the dialect in which ``router.state`` holds the payload, and the origin whose dialects it records."""
    monolith = recorded_dialect(checkpoint, MONOLITH)
    router = recorded_dialect(checkpoint, ROUTER) or (monolith or PayloadDialect()).as_router()
    origin = checkpoint.origin.without_dialects(ROUTER)
    return router, origin.without_dialects(MONOLITH) if monolith == router else origin


def _dump(dialect: PayloadDialect) -> dict[str, Any]:
    plain: dict[str, Any] = _DIALECT.dump_python(dialect, mode="json")
    return plain


def build_payload(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], dialect: PayloadDialect, extras: Extras
) -> dict[str, Any]:
    """Put a payload dict together in its dialect; the inverse of `parse_payload`.

    Args:
        checkpoint: gives everything but the model's tensors.
        state: the tensors to store as the model.
        dialect: entries that it does not list follow in their own order.
        extras: stored under our key, unless it is all defaults.
    """
    ours = extras.as_json()
    if ours:
        ours = {"version": extras.version, **ours}
    metadata = dict(checkpoint.metadata) if checkpoint.metadata is not None else None
    if dialect.bare and ours:
        metadata = {**(metadata or {}), OUR_KEY: ours}
    model: dict[str, Tensor] = dict(state)
    if metadata is not None or dialect.ordered:
        model = OrderedDict(state)
    if metadata is not None:
        model._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]  # as Module.state_dict does
    if dialect.bare:
        return model
    optimizer_key = dialect.optimizer_key or ("optim" if checkpoint.optimizer else None)
    entries: dict[str, Any] = {"model": model, **checkpoint.payload}
    if checkpoint.head is not None:
        entries["num_experts"] = checkpoint.num_experts
    if optimizer_key:
        entries[optimizer_key] = unbind(checkpoint.optimizer) if checkpoint.optimizer else None
    if checkpoint.param_names is not None:
        entries["param_names"] = list(checkpoint.param_names)
    new = [key for key in entries if key not in (*dialect.keys, "num_experts", "param_names")]
    if ours:
        entries[OUR_KEY] = ours
        new.append(OUR_KEY)
    return {key: entries[key] for key in (*dialect.keys, *new) if key in entries}


def make_extras(checkpoint: Checkpoint, dialect: PayloadDialect, origin: Origin, **more: Any) -> Extras:
    """Return what is recorded under our key beside a payload.

    Args:
        checkpoint: what is written.
        dialect: how the payload is written.
        origin: its dialects are recorded.
        more: further fields of `Extras`.
    """
    names = _names_to_record(checkpoint, dialect)
    return Extras(history=checkpoint.history, plan=checkpoint.plan, dialects=origin.dialects, **names, **more)


def _names_to_record(checkpoint: Checkpoint, dialect: PayloadDialect) -> dict[str, Any]:
    """Return the extras that record the optimizer's names, if reading the result back would not find them again."""
    if checkpoint.optimizer is None:
        return {}
    names, undecided = checkpoint.optimizer.params, checkpoint.optimizer.undecided
    state_dict = unbind(checkpoint.optimizer)
    as_written = checkpoint.with_unbound(UnboundOptimizer(state_dict))
    as_written.param_names = checkpoint.param_names if "param_names" in dialect.keys else None
    try:
        found = bind(as_written).optimizer
    except BindingError:
        found = None
    if found is not None and found.params == names and found.undecided == undecided:
        return {}
    return {
        "optimizer_names": tuple(names),
        "optimizer_digest": digest(state_dict),
        "optimizer_undecided": tuple(sorted(undecided)),
    }
