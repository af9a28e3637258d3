"""``experts/meta.json``: the lifecycle rows, in the trainer's variant or the offline exploder's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vraxion_ckpt.plugin_api import (
    Checkpoint,
    CkptWarning,
    HeadKind,
    InconsistentError,
    Lifecycle,
    Origin,
    Parsed,
    ReadContext,
    count,
    load_json,
    numbered,
)

META = "experts/meta.json"
_DIALECT = "meta"  # under this name the dialect is recorded
_MOST_NAMED = 8
_ROW_KEYS = ("contrib", "created_step", "last_used_step", "age_steps", "probation", "tenured")


@dataclass(frozen=True)
class MetaDialect:
    """How one meta.json is spelt; the defaults are the offline exploder's way, ours where no other is known.

    Attributes:
        keys: its entries in order.
        row_keys: the entries of a row in order.
        entries: those that follow from nothing else.
    """

    keys: tuple[str, ...] = ("source_checkpoint", "num_experts", "experts")
    row_keys: tuple[str, ...] = ("id", "tenured", "created_step", "last_used_step", "contrib")
    entries: Mapping[str, Any] = field(default_factory=dict)


_META_DIALECT = TypeAdapter(MetaDialect)


def read_meta(path: Path, context: ReadContext, parsed: Parsed) -> dict[str, Any] | None:
    """Read meta.json, or return None, with a warning, where there is none; refuse one of another save."""
    if not os.path.lexists(path):
        warnings.warn(f"{path} is missing; lifecycle rows are rebuilt", CkptWarning, stacklevel=2)
        return None
    context.register(path)
    meta = parse_meta(path)
    check_meta(meta, parsed, path)
    return meta


def parse_meta(path: Path) -> dict[str, Any]:
    """Read meta.json, whatever it says."""
    meta = load_json(path)
    if not isinstance(meta, dict) or not isinstance(meta.get("experts"), list):
        raise InconsistentError("must be an object with a list `experts`", path=path)
    return meta


def check_meta(meta: Mapping[str, Any], parsed: Parsed, path: Path) -> None:
    """Refuse a meta.json of another save than router.state."""
    stated = meta.get("num_experts")
    if type(stated) is not int:
        raise InconsistentError(f"must be a whole number, not {stated!r}", path=path, key="num_experts")
    if parsed.num_experts not in (None, stated):
        raise InconsistentError(f"is {stated}, router.state says {parsed.num_experts}", path=path, key="num_experts")
    step = parsed.checkpoint.payload.get("step")
    if "step" in meta and (type(meta["step"]) is not type(step) or meta["step"] != step):
        raise InconsistentError(
            f"is {meta['step']!r}, router.state has step {step!r}: parts of two saves",
            path=path,
            key="step",
            hint="a trainer was probably killed while saving; use an older checkpoint",
        )


def listed_as_deleted(meta: dict[str, Any] | None, num_experts: int, root: Path) -> frozenset[int]:
    """Return the experts that a trainer lists as garbage-collected, whether their shards are gone or not."""
    listed = (meta or {}).get("deleted", [])
    path = root / META
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < num_experts for i in listed):
        raise InconsistentError(f"must list expert ids below {num_experts}", path=path, key="deleted")
    if len(set(listed)) != len(listed):
        raise InconsistentError("lists an expert twice", path=path, key="deleted")
    return frozenset(listed)


def parse_rows(meta: dict[str, Any], num_experts: int, root: Path) -> dict[int, Lifecycle]:
    """Return the lifecycle rows by expert; there must be one for each."""
    path = root / META
    rows: dict[int, Lifecycle] = {}
    for place, row in enumerate(meta["experts"]):
        key = f"experts[{place}]"
        if not isinstance(row, dict) or type(row.get("id")) is not int:
            raise InconsistentError("must be an object with a whole number `id`", path=path, key=key)
        if row["id"] in rows:
            raise InconsistentError(f"is a second row for expert {row['id']}", path=path, key=key)
        rows[row["id"]] = _row_from_json(row, path, key)
    if len(rows) != num_experts or any(not 0 <= i < num_experts for i in rows):
        raise InconsistentError(
            f"has {count(len(rows), 'row')} for {count(num_experts, 'expert')}", path=path, key="experts"
        )
    return dict(sorted(rows.items()))


def _row_from_json(row: dict[str, Any], path: Path, key: str) -> Lifecycle:
    for entry in ("created_step", "last_used_step", "age_steps"):
        if type(row.get(entry, 0)) is not int:
            raise InconsistentError(f"{entry} must be a whole number", path=path, key=key)
    for entry in ("tenured", "probation"):
        if type(row.get(entry, False)) is not bool:
            raise InconsistentError(f"{entry} must be true or false", path=path, key=key)
    contrib = row.get("contrib", 0.0)
    if type(contrib) not in (int, float):
        raise InconsistentError("contrib must be a number", path=path, key=key)
    known = {entry: row[entry] for entry in _ROW_KEYS if entry in row}
    return Lifecycle(**known, extra={k: v for k, v in row.items() if k != "id" and k not in _ROW_KEYS})


def row_to_json(expert: int, row: Lifecycle, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return a row as it is written, its entries in the order of `keys`."""
    known = {"id": expert, **{key: getattr(row, key) for key in _ROW_KEYS}}
    more = [key for key in _ROW_KEYS if key not in keys and known[key] != getattr(Lifecycle, key)]
    entries = {key: value for key, value in known.items() if value is not None} | dict(row.extra)
    ordered = [*(key for key in keys if key in entries), *more, *(key for key in row.extra if key not in keys)]
    return {key: entries[key] for key in ordered}


def with_meta(origin: Origin, meta: dict[str, Any] | None) -> Origin:
    """Note how meta.json is spelt; other formats need to carry that only if it is not the exploder's way."""
    if meta is None:
        return origin
    rows = meta["experts"]
    dialect = MetaDialect(
        keys=tuple(meta),
        row_keys=tuple(rows[0]) if rows and isinstance(rows[0], dict) else MetaDialect.row_keys,
        entries={k: v for k, v in meta.items() if k not in ("num_experts", "step", "experts", "deleted")},
    )
    own = {_DIALECT: _META_DIALECT.dump_python(dialect, mode="json")}
    usual = replace(dialect, entries={k: v for k, v in dialect.entries.items() if k != "source_checkpoint"})
    carried = origin if usual == MetaDialect() else origin.with_dialect(_DIALECT, own[_DIALECT])
    return replace(carried, local=own)


def without_meta(origin: Origin) -> Origin:
    """Return an origin without the dialect of meta.json, which meta.json itself shows."""
    return origin.without_dialects(_DIALECT)


def recorded_meta(origin: Origin) -> MetaDialect:
    """Return how meta.json was spelt in the source, or the exploder's way."""
    try:
        return _META_DIALECT.validate_python(origin.dialect(_DIALECT) or origin.local.get(_DIALECT) or MetaDialect())
    except ValidationError:
        raise InconsistentError("is no spelling of meta.json", key="vraxion_ckpt.dialects.meta") from None


def rows_of(
    checkpoint: Checkpoint, meta: dict[str, Any] | None, listed: frozenset[int], root: Path
) -> dict[int, Lifecycle]:
    """Return the lifecycle row of every expert, assumed where meta.json has none.

    Args:
        checkpoint: with its head.
        meta: what meta.json holds, if there is one.
        listed: the experts that it lists as deleted; those whose tensors are there are live, and a warning says so.
        root: the checkpoint's directory.
    """
    head = checkpoint.head
    unknown = {i: Lifecycle.unknown(checkpoint.step) for i in range(checkpoint.num_experts)}
    if meta is None or head is None:
        return unknown
    without = head.kind is HeadKind.SINGLE and not meta["experts"]  # as the exploder writes it
    rows = unknown if without else parse_rows(meta, checkpoint.num_experts, root)
    collected = sorted(listed & head.experts.keys())
    if collected:
        message = (
            f"{root / META}: lists {numbered('expert', collected)} as deleted, but the weights are there: "
            "read as live, as trainers do"
        )
        warnings.warn(message, CkptWarning, stacklevel=4)
    return {i: replace(row, collected=True) if i in collected else row for i, row in rows.items()}


def is_without_rows(checkpoint: Checkpoint, dialect: MetaDialect) -> bool:
    """Tell whether no row is to be written: as the exploder does of a single head, while nobody has stated one."""
    single = checkpoint.head is not None and checkpoint.head.kind is HeadKind.SINGLE
    return single and checkpoint.has_no_rows and "step" not in dialect.keys
