"""``experts/meta.json``: the lifecycle rows, in the trainer's variant or the offline tool's."""

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
_DIALECT = "meta"  # the name under which `Origin` records the variant
_ROW_KEYS = ("contrib", "created_step", "last_used_step", "age_steps", "probation", "tenured")


@dataclass(frozen=True)
class MetaDialect:
    """The variant of a meta.json. By default, it is the offline tool's, which is written if no other is known.

    Attributes:
        keys: the keys of the file's object, in order.
        row_keys: the keys of each row of ``experts``, in order.
        entries: other entries of the source's file, which are written unchanged.
    """

    keys: tuple[str, ...] = ("source_checkpoint", "num_experts", "experts")
    row_keys: tuple[str, ...] = ("id", "tenured", "created_step", "last_used_step", "contrib")
    entries: Mapping[str, Any] = field(default_factory=dict)


_META_DIALECT = TypeAdapter(MetaDialect)


def read_meta(path: Path, context: ReadContext, parsed: Parsed) -> dict[str, Any] | None:
    """Read meta.json and compare it with router.state.

    Returns:
        The content of meta.json, or None, with a warning, if the file is missing.

    Raises:
        InconsistentError: meta.json is malformed, or belongs to another save than router.state.
    """
    if not os.path.lexists(path):
        warnings.warn(f"{path} is missing; lifecycle rows are rebuilt", CkptWarning, stacklevel=2)
        return None
    context.register(path)
    meta = parse_meta(path)
    check_meta(meta, parsed, path)
    return meta


def parse_meta(path: Path) -> dict[str, Any]:
    """Read meta.json without comparing it with router.state."""
    meta = load_json(path)
    if not isinstance(meta, dict) or not isinstance(meta.get("experts"), list):
        raise InconsistentError("must be an object with a list `experts`", path=path)
    return meta


def check_meta(meta: Mapping[str, Any], parsed: Parsed, path: Path) -> None:
    """Raise InconsistentError if meta.json belongs to another save than router.state."""
    stated = meta.get("num_experts")
    if type(stated) is not int:
        raise InconsistentError(f"num_experts must be a whole number, not {stated!r}", path=path, key="num_experts")
    if parsed.num_experts not in (None, stated):
        message = f"num_experts is {stated}, but {parsed.num_experts} in router.state"
        raise InconsistentError(message, path=path, key="num_experts")
    step = parsed.checkpoint.payload.get("step")
    if "step" in meta and (type(meta["step"]) is not type(step) or meta["step"] != step):
        raise InconsistentError(
            f"step is {meta['step']!r}, but {step!r} in router.state: the files are parts of two saves",
            path=path,
            key="step",
            hint="a trainer was probably killed while saving; use an older checkpoint",
        )


def listed_as_deleted(meta: dict[str, Any] | None, num_experts: int, root: Path) -> frozenset[int]:
    """Return the ids that meta.json lists as deleted. Their shards may still exist."""
    listed = (meta or {}).get("deleted", [])
    path = root / META
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < num_experts for i in listed):
        raise InconsistentError(f"deleted must be a list of expert ids below {num_experts}", path=path, key="deleted")
    if len(set(listed)) != len(listed):
        raise InconsistentError("deleted lists an expert twice", path=path, key="deleted")
    return frozenset(listed)


def parse_rows(meta: dict[str, Any], num_experts: int, root: Path) -> dict[int, Lifecycle]:
    """Return the lifecycle rows by expert id. Raise InconsistentError if they do not match the experts."""
    path = root / META
    rows: dict[int, Lifecycle] = {}
    for place, row in enumerate(meta["experts"]):
        key = f"experts[{place}]"
        if not isinstance(row, dict) or type(row.get("id")) is not int:
            raise InconsistentError("a row must be an object with a whole number `id`", path=path, key=key)
        if row["id"] in rows:
            raise InconsistentError(f"expert {row['id']} has a second row", path=path, key=key)
        rows[row["id"]] = _row_from_json(row, path, key)
    if len(rows) != num_experts or any(not 0 <= i < num_experts for i in rows):
        raise InconsistentError(
            f"meta.json has {count(len(rows), 'row')} for {count(num_experts, 'expert')}", path=path, key="experts"
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


def _row_to_json(expert: int, row: Lifecycle, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return a row as JSON: first the entries in `keys`, in order, then others that differ from the default."""
    known = {"id": expert, **{key: getattr(row, key) for key in _ROW_KEYS}}
    more = [key for key in _ROW_KEYS if key not in keys and known[key] != getattr(Lifecycle, key)]
    entries = {key: value for key, value in known.items() if value is not None} | dict(row.extra)
    ordered = [*(key for key in keys if key in entries), *more, *(key for key in row.extra if key not in keys)]
    return {key: entries[key] for key in ordered}


def with_meta(origin: Origin, meta: dict[str, Any] | None) -> Origin:
    """Record the variant of meta.json in `origin`. Other formats also keep it, unless it is the offline tool's."""
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
    """Remove the variant of meta.json from `origin`, because meta.json itself shows it."""
    return origin.without_dialects(_DIALECT)


def _recorded_meta(origin: Origin) -> MetaDialect:
    try:
        return _META_DIALECT.validate_python(origin.dialect(_DIALECT) or origin.local.get(_DIALECT) or MetaDialect())
    except ValidationError:
        message = "the recorded variant of meta.json is malformed"
        raise InconsistentError(message, key="vraxion_ckpt.dialects.meta") from None


def rows_of(
    checkpoint: Checkpoint, meta: dict[str, Any] | None, listed: frozenset[int], root: Path
) -> dict[int, Lifecycle]:
    """Return the lifecycle row of every expert, with assumed values if meta.json has no rows.

    Args:
        checkpoint: the checkpoint, whose head is already read.
        meta: the content of meta.json; None if the file is missing.
        listed: the ids that meta.json lists as deleted. If such an expert has tensors, it is read, with a warning.
        root: the checkpoint's directory.
    """
    head = checkpoint.head
    unknown = {i: Lifecycle.unknown(checkpoint.step) for i in range(checkpoint.num_experts)}
    if meta is None or head is None:
        return unknown
    # The offline tool writes no row for a single head.
    rows_omitted = head.kind is HeadKind.SINGLE and not meta["experts"]
    rows = unknown if rows_omitted else parse_rows(meta, checkpoint.num_experts, root)
    collected = sorted(listed & head.experts.keys())
    if collected:
        message = (
            f"{root / META}: lists {numbered('expert', collected)} as deleted, but the shards exist; "
            "they are read as live experts, as trainers do"
        )
        warnings.warn(message, CkptWarning, stacklevel=4)
    return {i: replace(row, collected=True) if i in collected else row for i, row in rows.items()}


def meta_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of meta.json, in the source's variant, or in the offline tool's if the source had none."""
    origin = checkpoint.origin
    dialect = _recorded_meta(origin)
    single = checkpoint.head is not None and checkpoint.head.kind is HeadKind.SINGLE
    # The offline tool writes no row for a single head. If rows are known, they are written nevertheless.
    without_rows = single and checkpoint.has_no_rows and "step" not in dialect.keys
    rows = {} if without_rows else checkpoint.lifecycle
    deleted = checkpoint.head.deleted if checkpoint.head else frozenset()
    known: dict[str, Any] = {
        "source_checkpoint": origin.path.name if origin.path else "",
        "num_experts": checkpoint.payload.get("num_experts", checkpoint.num_experts),
        "step": checkpoint.payload.get("step"),
        "experts": [],
        "deleted": sorted(deleted.union(i for i, row in checkpoint.lifecycle.items() if row.collected)),
    }
    entries = {**known, **dialect.entries}
    keys = list(dialect.keys)
    if known["deleted"] and "deleted" not in keys:
        keys.append("deleted")
    entries["experts"] = [_row_to_json(i, row, dialect.row_keys) for i, row in sorted(rows.items())]
    return {key: entries[key] for key in keys if key in entries}
