"""The keys of a payload dict, and their order, as a checkpoint was read.

They are recorded in its origin, so that it is written back in the same way. Which keys hold the model and the optimizer
is declared by `vraxion_ckpt.checkpoint.dialects`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.provenance import Origin
from vraxion_ckpt.errors import InconsistentError
from vraxion_ckpt.formats.extras import OUR_KEY, Extras

# The two places that hold a payload: the single file of a monolith, and ``router.state`` of a modular directory.
# Existing files record dialects under these names, so the names must not change.
MONOLITH = "pt"
ROUTER = "router"
_MODEL, _OPTIMIZER = "model", "optim"  # the keys in ``router.state``


@dataclass(frozen=True)
class PayloadDialect:
    """The layout of a payload dict.

    Attributes:
        bare: whether the dict is the state dict itself.
        ordered: whether the state dict is an OrderedDict, as ``Module.state_dict()`` returns it.
        optimizer_key: the key of the optimizer; None if there is no such key.
        keys: the keys of the dict in order; empty for a bare state dict.
        model_key: the key of the model's state dict.
        named: whether the user named the keys. Then the file records them, because no dialect knows them.
    """

    bare: bool = False
    ordered: bool = False
    optimizer_key: str | None = None
    keys: tuple[str, ...] = (_MODEL,)
    model_key: str = _MODEL
    named: bool = False

    def as_router(self) -> PayloadDialect:
        """Return the dialect in which the trainer of a modular directory writes the same payload."""
        renamed = {self.model_key: _MODEL, self.optimizer_key: _OPTIMIZER}
        keys = [renamed.get(key, key) for key in (_MODEL,) * self.bare + self.keys]
        keys += [key for key in ("num_experts", "param_names") if key not in keys]
        optimizer_key = self.optimizer_key and _OPTIMIZER
        return PayloadDialect(False, self.ordered, optimizer_key, tuple(keys), _MODEL)

    def implies(self, router: PayloadDialect, has_head: bool) -> bool:
        """Tell whether `as_router` returns `router`, which may lack ``param_names``, or ``num_experts`` if headless."""
        unknown = {"param_names"} if has_head else {"param_names", "num_experts"}
        known = tuple(key for key in self.as_router().keys if key not in unknown or key in router.keys)
        return replace(self.as_router(), keys=known) == router

    def __str__(self) -> str:
        if self.bare:
            return "a bare state dict"
        return f"a payload dict of {', '.join(self.keys)}"


_DIALECT = TypeAdapter(PayloadDialect)


def origin_of(format_name: str, path: Path, place: str, dialect: PayloadDialect, extras: Extras) -> Origin:
    """Return the origin of a checkpoint that was read from a payload.

    Args:
        format_name: the name of the adapter.
        path: the checkpoint.
        place: where the payload was, `MONOLITH` or `ROUTER`.
        dialect: the dialect of the payload.
        extras: the extras in the payload, which record the dialects of other formats.
    """
    return Origin(format_name, path, extras.dialects).with_dialect(place, _dump(dialect))


def origin_of_state_dict(origin: Origin) -> Origin:
    """Return an origin that records that the checkpoint was a bare state dict."""
    return origin.with_dialect(MONOLITH, _dump(PayloadDialect(bare=True, ordered=True, keys=())))


def recorded_dialect(checkpoint: Checkpoint, place: str) -> PayloadDialect | None:
    """Return the payload dialect that is recorded for `MONOLITH` or `ROUTER`; None if there is none.

    Raises:
        InconsistentError: the recorded value is not a payload dialect.
    """
    raw = checkpoint.origin.dialects.get(place)
    try:
        return _DIALECT.validate_python(raw) if raw is not None else None
    except ValidationError:
        raise InconsistentError("is not a payload dialect", key=f"{OUR_KEY}.dialects.{place}") from None


def monolith_dialect(checkpoint: Checkpoint) -> tuple[PayloadDialect, Origin]:
    """Return the dialect in which to write the payload into one file, and the origin to record there.

    Raises:
        InconsistentError: see `recorded_dialect`.
    """
    origin = checkpoint.origin.without_dialects(MONOLITH)
    router = recorded_dialect(checkpoint, ROUTER)
    dialect = recorded_dialect(checkpoint, MONOLITH) or router or PayloadDialect()
    if dialect.bare and (checkpoint.payload or checkpoint.optimizer):
        dialect = router or PayloadDialect(ordered=dialect.ordered)  # a bare state dict cannot hold them
    if router is None or dialect.implies(router, checkpoint.head is not None):
        origin = origin.without_dialects(ROUTER)
    return dialect, origin


def router_dialect(checkpoint: Checkpoint) -> tuple[PayloadDialect, Origin]:
    """Return the dialect in which to write the payload into ``router.state``, and the origin to record there.

    Raises:
        InconsistentError: see `recorded_dialect`.
    """
    monolith = recorded_dialect(checkpoint, MONOLITH)
    router = recorded_dialect(checkpoint, ROUTER) or (monolith or PayloadDialect()).as_router()
    origin = checkpoint.origin.without_dialects(ROUTER)
    return router, origin.without_dialects(MONOLITH) if monolith == router else origin


def _dump(dialect: PayloadDialect) -> dict[str, Any]:
    plain: dict[str, Any] = _DIALECT.dump_python(dialect, mode="json")
    return plain
