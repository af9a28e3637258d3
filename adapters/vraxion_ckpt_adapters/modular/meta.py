"""``experts/meta.json``: the lifecycle rows, in the trainer's variant or the offline tool's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
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
    dump_json,
    load_json,
    numbered,
)

META = "experts/meta.json"
_DIALECT = "meta"  # the name under which `Origin` records the variant
_ROW_TYPES: Mapping[str, tuple[type, ...]] = {
    "contrib": (int, float),
    "created_step": (int,),
    "last_used_step": (int,),
    "age_steps": (int,),
    "probation": (bool,),
    "tenured": (bool,),
}
_TYPE_NAMES: dict[tuple[type, ...], str] = {
    (int, float): "a number",
    (int,): "a whole number",
    (bool,): "true or false",
}


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
    step = _step(parsed.checkpoint)
    if "step" in meta and (type(meta["step"]) is not type(step) or meta["step"] != step):
        raise InconsistentError(
            f"step is {meta['step']!r}, but {step!r} in router.state: the files are parts of two saves",
            path=path,
            key="step",
            hint="a trainer was probably killed while saving; use an older checkpoint",
        )


def _step(checkpoint: Checkpoint) -> Any:
    """Return the step as meta.json has it. In the payload, it may be a number of numpy."""
    known = checkpoint.known_step
    return checkpoint.payload.get("step") if known is None else known


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
    checked: dict[tuple[Any, ...], list[str]] = {}  # keys and types of a row → its keys that have no field
    for place, row in enumerate(meta["experts"]):
        kind = (*row, *map(type, row.values())) if isinstance(row, dict) else ()
        if kind not in checked:
            checked[kind] = _check_row(row, path, place)
        if row["id"] in rows:
            raise InconsistentError(f"expert {row['id']} has a second row", path=path, key=f"experts[{place}]")
        known = dict(row)
        expert = known.pop("id")
        extra = {key: known.pop(key) for key in checked[kind]}
        rows[expert] = Lifecycle(**known, extra=extra)
    if len(rows) != num_experts or not set(range(num_experts)).issuperset(rows):
        raise InconsistentError(
            f"meta.json has {count(len(rows), 'row')} for {count(num_experts, 'expert')}", path=path, key="experts"
        )
    return dict(sorted(rows.items()))


def _check_row(row: Any, path: Path, place: int) -> list[str]:
    """Check the keys and the types of a row. Return its keys that are not fields of a `Lifecycle`."""
    if not isinstance(row, dict) or type(row.get("id")) is not int:
        message = "a row must be an object with a whole number `id`"
        raise InconsistentError(message, path=path, key=f"experts[{place}]")
    for entry, value in row.items():
        kinds = _ROW_TYPES.get(entry)
        if kinds is not None and type(value) not in kinds:
            raise InconsistentError(f"{entry} must be {_TYPE_NAMES[kinds]}", path=path, key=f"experts[{place}]")
    return [entry for entry in row if entry != "id" and entry not in _ROW_TYPES]


def _row_to_json(expert: int, row: Lifecycle, keys: tuple[str, ...], others: Sequence[str]) -> dict[str, Any]:
    """Return a row as JSON: first the entries in `keys`, in order, then `others` that differ from the default."""
    entries: dict[str, Any] = {}
    for key in keys:
        if key in row.extra:
            entries[key] = row.extra[key]
        elif key == "id":
            entries[key] = expert
        elif key in _ROW_TYPES and (value := getattr(row, key)) is not None:
            entries[key] = value
    entries |= {key: value for key in others if (value := getattr(row, key)) != getattr(Lifecycle, key)}
    return entries | dict(row.extra)


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
    unknown = dict.fromkeys(range(checkpoint.num_experts), Lifecycle.unknown(checkpoint.step))
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
    return rows | {i: replace(rows[i], collected=True) for i in collected}


@dataclass(frozen=True)
class MetaContent:
    """The content of a meta.json that is to be written.

    Attributes:
        entries: the entries of the file in order, where ``experts`` is empty.
        rows: the rows of ``experts`` by expert id, in order.
        row_keys: the keys of each row, in order.
    """

    entries: Mapping[str, Any]
    rows: Mapping[int, Lifecycle]
    row_keys: tuple[str, ...]

    @property
    def step(self) -> Any:
        """The step, or None if the file has none."""
        return self.entries.get("step")

    def loaded_rows(self, num_experts: int) -> tuple[Any, ...]:
        """Return a value that is equal for two files from which a loader gets the same rows of its experts."""
        return self.row_keys, dict(islice(self.rows.items(), num_experts))

    def as_bytes(self) -> bytes:
        """Return the bytes of the file."""
        others = [key for key in _ROW_TYPES if key not in self.row_keys]
        listed = [_row_to_json(i, row, self.row_keys, others) for i, row in self.rows.items()]
        return dump_json({key: listed if key == "experts" else value for key, value in self.entries.items()})


def meta_content(checkpoint: Checkpoint) -> MetaContent:
    """Return the content of meta.json, in the source's variant, or in the offline tool's if the source had none."""
    origin = checkpoint.origin
    dialect = _recorded_meta(origin)
    single = checkpoint.head is not None and checkpoint.head.kind is HeadKind.SINGLE
    # The offline tool writes no row for a single head. If rows are known, they are written nevertheless.
    without_rows = single and checkpoint.has_no_rows and "step" not in dialect.keys
    deleted = checkpoint.head.deleted if checkpoint.head else frozenset()
    known: dict[str, Any] = {
        "source_checkpoint": origin.path.name if origin.path else "",
        "num_experts": checkpoint.payload.get("num_experts", checkpoint.num_experts),
        "step": _step(checkpoint),
        "deleted": sorted(deleted.union(i for i, row in checkpoint.lifecycle.items() if row.collected)),
    }
    entries = {**known, **dialect.entries, "experts": []}
    keys = list(dialect.keys)
    if known["deleted"] and "deleted" not in keys:
        keys.append("deleted")
    rows = {} if without_rows else dict(sorted(checkpoint.lifecycle.items()))
    return MetaContent({key: entries[key] for key in keys if key in entries}, rows, dialect.row_keys)
