"""Modular directory: ``system/router.state``, ``experts/expert_<id>.pt``, ``experts/meta.json``.

``router.state`` holds the payload dict with every model tensor but ``head.experts.*`` and the optimizer of all
parameters, the experts' included; each shard is a plain dict of leaf name → tensor. ``meta.json`` has the lifecycle
rows, in one of two variants: the trainer's, with ``step`` and ``deleted``, and the offline exploder's, with
``source_checkpoint``. A single head stays in ``router.state``, and there are no shards.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from vraxion_ckpt import jsonfile, torchfile
from vraxion_ckpt.adapter import Adapter, Faults, Loss, Part
from vraxion_ckpt.disk import write_new
from vraxion_ckpt.errors import CkptWarning, CorruptError, InconsistentError, StorageError
from vraxion_ckpt.hookspecs import hookimpl
from vraxion_ckpt.model import Checkpoint, Expert, Head, HeadKind, Lifecycle, Origin
from vraxion_ckpt.options import NameList
from vraxion_ckpt.payload import (
    Extras,
    Parsed,
    PayloadDialect,
    build_payload,
    dump_dialect,
    names_to_record,
    origin_of,
    parse_payload,
    recorded_dialect,
    split_head,
    with_head,
)
from vraxion_ckpt.plain import named_tensors
from vraxion_ckpt.sources import Fingerprint, Sources

_ROUTER = "system/router.state"
_META = "experts/meta.json"
_SHARD = re.compile(r"expert_([0-9]{3}|[1-9][0-9]{3,8})\.pt")
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


def shard_name(expert: int) -> str:
    """Return a shard's file name: the id in at least three digits."""
    return f"expert_{expert:03d}.pt"


class ModularAdapter(Adapter):
    """Directory with system/router.state, a shard per expert, and meta.json."""

    name: ClassVar[str] = "modular"
    suffixes: ClassVar[tuple[str, ...]] = ("/",)
    pivot: ClassVar[str | None] = _ROUTER

    tenure_all: bool = Field(False, description="on writing, mark every expert tenured")
    allow_global: NameList = Field((), description="classes its pickles may use beside plain data, by full name")

    @property
    def is_directory(self) -> bool:
        return True

    @classmethod
    def detect(cls, path: Path) -> bool:
        return (_root(path) / _ROUTER).is_file()

    # --- read ---

    def read(self, path: Path) -> Checkpoint:
        return self._read(_Files(_root(path)))

    def read_over(self, path: Path, staged: Path, removed: Collection[str]) -> Checkpoint:
        return self._read(_Files(_root(path), staged, frozenset(removed)))

    def examine(self, path: Path, faults: Faults) -> Checkpoint | None:
        files, sources = _Files(_root(path)), Sources()
        router, place = files.path(_ROUTER), files.path(_META)
        parsed = faults.attempt(lambda: parse_payload(torchfile.load(router, sources, self.allow_global), router))
        meta = faults.attempt(lambda: _parse_meta(place)) if place.is_file() else None
        shards = _present_shards(files.root / "experts")
        if parsed is not None:
            if meta is not None:
                faults.attempt(lambda: _check_meta(meta, parsed, place))
            number = parsed.num_experts
            if number is not None and (shards or number > 1):
                faults.attempt(lambda: _check_ids(shards, _deleted(meta, number, files.root), number, files.root))
                faults.attempt(lambda: _rows(meta, number, files.root) if meta else {})
        leaves = _leaves(parsed.checkpoint.param_names) if parsed is not None else {}
        whole: tuple[int, dict[str, Tensor]] | None = None
        for expert, shard in shards.items():
            tensors = faults.attempt(
                partial(_open_shard, shard, expert, leaves.get(expert), sources, self.allow_global)
            )
            if tensors is not None and whole is not None:
                faults.attempt(partial(_check_fit, shard, expert, tensors, *whole))
            whole = whole or (None if tensors is None else (expert, tensors))
        for source in sources:
            if source.verify is not None:
                faults.attempt(source.verify)
        return faults.attempt(lambda: self._read(files))

    def _read(self, files: _Files) -> Checkpoint:
        root, router = files.root, files.path(_ROUTER)
        sources = Sources()
        for place in (root / "system", router, root / "experts", files.path(_META)):
            if place.is_symlink() and not place.resolve().is_relative_to(root.resolve()):
                raise InconsistentError("is a link that leads out of the checkpoint", path=place)
        parsed = parse_payload(torchfile.load(router, sources, self.allow_global), router)
        meta = _read_meta(files.path(_META), sources, parsed)
        found = split_head(parsed.checkpoint, router)
        if found.head is not None and found.head.kind is HeadKind.EXPERTS:
            raise InconsistentError("holds head.experts.*, which belong into shards", path=router, key="model")
        shards = files.shards()
        num_experts = parsed.num_experts
        if num_experts is None:
            num_experts = meta["num_experts"] if meta else max(1, len(shards))
        if found.head is None and (shards or num_experts > 1):
            found = with_head(found, self._sharded_head(root, shards, num_experts, meta, parsed, sources))
        elif shards:
            raise InconsistentError("has shards beside a single head in router.state", path=root)
        elif found.head is not None and num_experts != 1:
            raise InconsistentError(f"is {num_experts}, but the head is single", path=router, key="num_experts")
        elif found.head is not None and _deleted(meta, num_experts, root):
            raise InconsistentError("lists expert 0, whose head is in router.state", path=root, key="deleted")
        return replace(
            found,
            lifecycle=_rows(meta, found.num_experts, root) if meta and found.head else _fresh_rows(found),
            origin=_with_meta(origin_of(self.name, root, "router", parsed.dialect, parsed.extras), meta),
            sources=sources,
        )

    def _sharded_head(
        self,
        root: Path,
        shards: dict[int, Path],
        num_experts: int,
        meta: dict[str, Any] | None,
        parsed: Parsed,
        sources: Sources,
    ) -> Head:
        deleted = _deleted(meta, num_experts, root)
        _check_ids(shards, deleted, num_experts, root)
        leaves = _leaves(parsed.checkpoint.param_names)
        first: list[tuple[int, dict[str, Tensor]]] = []  # the shard that was opened first: what the others must fit

        def open_shard(expert: int, path: Path) -> dict[str, Tensor]:
            Sources(sources.files[:1]).check_unchanged()  # the router: a shard must be of the same state
            tensors = _open_shard(path, expert, leaves.get(expert), sources, self.allow_global)
            other = _of_another_size(expert, tensors, shards)
            if not first and other is not None:
                more = _open_shard(shards[other], other, leaves.get(other), sources, self.allow_global)
                (one, its), (two, others) = sorted([(expert, tensors), (other, more)], key=lambda pair: pair[0])
                _check_fit(shards[two], two, others, one, its)
            first[:] = first or [(expert, tensors)]
            _check_fit(path, expert, tensors, *first[0])
            return tensors

        def opener(expert: int, path: Path) -> Expert:
            return Expert(lambda: open_shard(expert, path))

        position = parsed.extras.head_position
        if position is None:
            position = _derived_position(list(parsed.checkpoint.core), parsed.checkpoint.param_names)
        if not 0 <= position <= len(parsed.checkpoint.core):
            raise InconsistentError("is beyond the state dict", path=root, key="head_position")
        experts = {i: opener(i, shards[i]) for i in sorted(shards)}
        return Head(HeadKind.EXPERTS, experts, position, deleted)

    # --- write ---

    def dialect(self, checkpoint: Checkpoint) -> str:
        return str(recorded_dialect(checkpoint, "router") or "")

    def losses(self, checkpoint: Checkpoint) -> list[Loss]:
        tied = sorted(_tied_across_files(checkpoint))
        lost = []
        if tied:
            lost.append(
                Loss(f"tied tensors {', '.join(tied[:3])}", "each shard is a file of its own, with its own copy")
            )
        if checkpoint.head and list(checkpoint.head.experts) != sorted(checkpoint.head.experts):
            lost.append(Loss("the experts' order in the state dict", "shards have none but that of their ids"))
        return lost

    def held(self, checkpoint: Checkpoint) -> Checkpoint:
        head, rows = checkpoint.head, checkpoint.lifecycle
        if head is not None:
            head = replace(head, experts=dict(sorted(head.experts.items())))
        if self.tenure_all:
            rows = {i: replace(row, tenured=True) for i, row in rows.items()}
        return replace(checkpoint, head=head, lifecycle=rows)

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        try:
            (path / "system").mkdir()
            (path / "experts").mkdir()
        except OSError as error:
            raise StorageError.from_os_error(error, path) from error
        for name, part in self.parts(checkpoint).items():
            part.write(path / name)

    def size(self, checkpoint: Checkpoint) -> int:
        return sum(part.size() for part in self.parts(checkpoint).values())

    def parts(self, checkpoint: Checkpoint) -> dict[str, Part]:
        head = checkpoint.head
        meta = self._meta(checkpoint)
        parts = {_ROUTER: _torch_part(object(), lambda: self._router(checkpoint))}  # what it holds is not looked at
        if head is not None and head.kind is HeadKind.EXPERTS:
            for i, expert in head.experts.items():
                parts[f"experts/{shard_name(i)}"] = _torch_part(expert, partial(_shard, expert))
        parts[_META] = Part(meta, lambda path: write_new(path, jsonfile.dumps(meta)), lambda: len(jsonfile.dumps(meta)))
        return parts

    def unseen(self, name: str, before: Checkpoint, after: Checkpoint, reader: Checkpoint) -> bool:
        if name == _META:  # a loader takes the rows of its experts, by their place, and nothing else
            if "meta" not in before.origin.local:
                return False  # there was none, and a loader that finds none makes rows up
            old, new = self._meta(before), self._meta(after)
            rows = slice(0, reader.num_experts)
            return bool(old["experts"][rows] == new["experts"][rows] and old.get("step") == new.get("step"))
        shard = _SHARD.fullmatch(Path(name).name)
        if reader.head is None or reader.head.kind is HeadKind.SINGLE:
            return shard is not None
        return shard is not None and int(shard[1]) >= reader.num_experts

    def _router(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the payload that router.state holds."""
        head = checkpoint.head
        sharded = head is not None and head.kind is HeadKind.EXPERTS
        state = checkpoint.core if sharded else checkpoint.state_dict()
        pt = recorded_dialect(checkpoint, "pt")
        router = recorded_dialect(checkpoint, "router") or (pt or PayloadDialect()).as_router()
        dialects = {k: v for k, v in checkpoint.origin.dialects.items() if k not in ("router", "meta", "pt")}
        if pt is not None and pt != router:
            dialects["pt"] = dump_dialect(pt)
        derived = _derived_position(list(state), checkpoint.param_names)
        extras = Extras(
            history=checkpoint.history,
            plan=checkpoint.plan,
            head_position=head.position if head and sharded and head.position != derived else None,
            **names_to_record(checkpoint, router),
            dialects=dialects,
        )
        return build_payload(checkpoint, state, router, extras)

    def _meta(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return meta.json in the variant the source had, or the exploder's."""
        origin = checkpoint.origin
        dialect = _recorded_meta(origin)
        known: dict[str, Any] = {
            "source_checkpoint": origin.path.name if origin.path else "",
            "num_experts": checkpoint.payload.get("num_experts", checkpoint.num_experts),
            "step": checkpoint.step,
            "experts": [],
            "deleted": sorted(checkpoint.head.deleted) if checkpoint.head else [],
        }
        entries = {**known, **dialect.entries}
        keys = list(dialect.keys)
        if known["deleted"] and "deleted" not in keys:
            keys.append("deleted")
        entries["experts"] = [_row_to_json(i, row, dialect.row_keys) for i, row in sorted(checkpoint.lifecycle.items())]
        return {key: entries[key] for key in keys if key in entries}

    def foreign_files(self, path: Path) -> list[Path]:
        """List what is neither a folder of the layout nor one of its files."""
        if not path.is_dir():
            return []
        ours = {path / "system", path / "experts", path / _ROUTER, path / _META}
        return [
            entry
            for entry in sorted(path.rglob("*"))
            if entry not in ours and not (entry.parent == path / "experts" and _SHARD.fullmatch(entry.name))
        ]


def _root(path: Path) -> Path:
    """Return the checkpoint's directory, also for the path of its router.state."""
    is_router = path.name == "router.state" and path.parent.name == "system"
    return path.parent.parent if is_router else path


@dataclass(frozen=True)
class _Files:
    """Where a checkpoint's files are: all in its directory, or some of them staged over it."""

    root: Path
    staged: Path | None = None
    removed: frozenset[str] = frozenset()

    def path(self, name: str) -> Path:
        """Return the place of a file, given by its path below the directory."""
        over = self.staged / name if self.staged else None
        return over if over is not None and over.exists() else self.root / name

    def shards(self) -> dict[int, Path]:
        """List the shards by expert; opens none."""
        found = _list_shards(self.root / "experts", self.removed)
        return found | (_list_shards(self.staged / "experts", frozenset()) if self.staged else {})


def _list_shards(folder: Path, removed: frozenset[str]) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    try:
        with os.scandir(folder) as entries:
            listed = sorted(
                (e for e in entries if e.name.startswith("expert_") and e.name.endswith(".pt")), key=lambda e: e.name
            )
    except OSError as error:
        raise StorageError.from_os_error(error, folder) from error
    shards: dict[int, Path] = {}
    for entry in listed:
        path = folder / entry.name
        if f"experts/{entry.name}" in removed:
            continue
        found = _SHARD.fullmatch(entry.name)
        if not found:
            raise InconsistentError("a shard is called expert_<id>.pt, its id in three digits or more", path=path)
        if not entry.is_file(follow_symlinks=False):
            raise InconsistentError("a shard must be a regular file", path=path)
        if not entry.stat(follow_symlinks=False).st_size:  # seen even where it need not be opened
            raise InconsistentError(f"the shard of expert {int(found[1])} is damaged: is empty", path=path)
        shards[int(found[1])] = path
    return shards


def _present_shards(folder: Path) -> dict[int, Path]:
    """List the files that are shards by their names, whatever else lies beside them."""
    found = ((_SHARD.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return dict(sorted((int(name[1]), path) for name, path in found if name and path.is_file()))


def _check_ids(shards: Collection[int], deleted: frozenset[int], num_experts: int, root: Path) -> None:
    """Refuse shards that are not those of the experts that there must be."""
    alive = sorted(deleted.intersection(shards))
    if alive:
        raise InconsistentError(f"lists expert {alive[0]}, whose shard is there", path=root, key="deleted")
    if len(shards) + len(deleted) != num_experts or max((*shards, *deleted)) != num_experts - 1:
        beyond = [i for i in shards if i >= num_experts]
        if beyond:
            message = f"{shard_name(beyond[0])} is beyond num_experts = {num_experts}"
        else:
            present = deleted.union(shards)
            missing = next(i for i in range(len(present) + 1) if i not in present)
            message = f"{shard_name(missing)} is missing; num_experts is {num_experts}"
        raise InconsistentError(message, path=root / "experts")


def _shard(expert: Expert) -> dict[str, Tensor]:
    return {leaf: _compact(tensor) for leaf, tensor in expert.items()}


def _torch_part(content: object, value: Callable[[], Any]) -> Part:
    """Return a file of torch.save whose value is made when it is needed."""
    return Part(content, lambda path: torchfile.save(value(), path), lambda: torchfile.size(value()))


def _leaves(param_names: tuple[str, ...] | None) -> dict[int, set[str]]:
    """Return the parameters of each expert, as param_names lists them."""
    leaves: dict[int, set[str]] = {}
    for name in param_names or ():
        if found := re.fullmatch(r"head\.experts\.([0-9]{1,9})\.(.+)", name):
            leaves.setdefault(int(found[1]), set()).add(found[2])
    return leaves


def _open_shard(
    path: Path, expert: int, leaves: set[str] | None, sources: Sources, allow_globals: tuple[str, ...]
) -> dict[str, Tensor]:
    try:
        shard = torchfile.load(path, sources, allow_globals)
    except CorruptError as error:
        message = f"the shard of expert {expert} is damaged: {error.message}"
        raise InconsistentError(message, path=path, key=error.key, hint=error.hint) from error
    if not isinstance(shard, dict) or not shard:
        raise InconsistentError(f"the shard of expert {expert} holds no tensors", path=path)
    for leaf, tensor in shard.items():
        if not isinstance(leaf, str) or not isinstance(tensor, Tensor):
            raise InconsistentError(f"the shard of expert {expert} holds something else than tensors", path=path)
    if leaves is not None and not leaves <= shard.keys():
        lacking = ", ".join(sorted(leaves - shard.keys()))
        raise InconsistentError(f"the shard of expert {expert} lacks {lacking}", path=path)
    return shard


def _of_another_size(expert: int, tensors: dict[str, Tensor], shards: dict[int, Path]) -> int | None:
    """Return another expert whose shard is not as large, though plain linear experts are alike: there, look closer.

    So that a shard that does not fit is seen even where no other need be opened.
    """
    other = next((i for i in shards if i != expert), None)
    if other is None or any("." in leaf for leaf in tensors):
        return None
    return other if shards[other].stat().st_size != shards[expert].stat().st_size else None


def _check_fit(path: Path, expert: int, tensors: dict[str, Tensor], other: int, model: dict[str, Tensor]) -> None:
    """Refuse a shard that a loader would skip because it does not fit in where another one does."""
    if odd := tensors.keys() ^ model.keys():
        message = f"the shards of experts {other} and {expert} do not hold the same tensors: {', '.join(sorted(odd))}"
        raise InconsistentError(message, path=path)
    for leaf, tensor in tensors.items():
        # Hidden widths differ between experts with inner layers; plain linear experts are all alike.
        alike = tensor.ndim == model[leaf].ndim if "." in leaf else tensor.shape == model[leaf].shape
        if not alike or tensor.dtype != model[leaf].dtype:
            raise InconsistentError(
                f"in the shard of expert {expert} it is {list(tensor.shape)} of {tensor.dtype}, "
                f"in that of expert {other} {list(model[leaf].shape)} of {model[leaf].dtype}",
                path=path,
                key=leaf,
            )


def _derived_position(core: list[str], param_names: tuple[str, ...] | None) -> int:
    """Return where the head stands among the core tensors, as param_names tells; last if it does not."""
    names = list(param_names or ())
    head = [i for i, name in enumerate(names) if name.startswith("head.experts.")]
    following = names[head[-1] + 1 :] if head else []
    places = {name: place for place, name in enumerate(core)}
    return next((places[name] for name in following if name in places), len(core))


# --- meta.json ---


def _read_meta(path: Path, sources: Sources, parsed: Parsed) -> dict[str, Any] | None:
    if not os.path.lexists(path):
        warnings.warn(f"{path} is missing; lifecycle rows are rebuilt", CkptWarning, stacklevel=2)
        return None
    if not path.is_file():
        raise InconsistentError("must be a regular file", path=path)
    sources.add(path, Fingerprint.of(path))
    meta = _parse_meta(path)
    _check_meta(meta, parsed, path)
    return meta


def _parse_meta(path: Path) -> dict[str, Any]:
    meta = jsonfile.load(path)
    if not isinstance(meta, dict) or not isinstance(meta.get("experts"), list):
        raise InconsistentError("must be an object with a list `experts`", path=path)
    return meta


def _check_meta(meta: Mapping[str, Any], parsed: Parsed, path: Path) -> None:
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


def _deleted(meta: dict[str, Any] | None, num_experts: int, root: Path) -> frozenset[int]:
    listed = (meta or {}).get("deleted", [])
    path = root / _META
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < num_experts for i in listed):
        raise InconsistentError(f"must list expert ids below {num_experts}", path=path, key="deleted")
    if len(set(listed)) != len(listed):
        raise InconsistentError("lists an expert twice", path=path, key="deleted")
    return frozenset(listed)


def _rows(meta: dict[str, Any], num_experts: int, root: Path) -> dict[int, Lifecycle]:
    path = root / _META
    rows: dict[int, Lifecycle] = {}
    for place, row in enumerate(meta["experts"]):
        key = f"experts[{place}]"
        if not isinstance(row, dict) or type(row.get("id")) is not int:
            raise InconsistentError("must be an object with a whole number `id`", path=path, key=key)
        if row["id"] in rows:
            raise InconsistentError(f"is a second row for expert {row['id']}", path=path, key=key)
        rows[row["id"]] = _row_from_json(row, path, key)
    if len(rows) != num_experts or any(not 0 <= i < num_experts for i in rows):
        raise InconsistentError(f"has {len(rows)} rows for {num_experts} experts", path=path, key="experts")
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
    known = {"id": expert, **{key: getattr(row, key) for key in _ROW_KEYS}}
    more = [key for key in _ROW_KEYS if key not in keys and known[key] != getattr(Lifecycle, key)]
    entries = {key: value for key, value in known.items() if value is not None} | dict(row.extra)
    ordered = [*(key for key in keys if key in entries), *more, *(key for key in row.extra if key not in keys)]
    return {key: entries[key] for key in ordered}


def _with_meta(origin: Origin, meta: dict[str, Any] | None) -> Origin:
    """Note how meta.json is spelt; other formats need to carry that only if it is not the exploder's way."""
    if meta is None:
        return origin
    rows = meta["experts"]
    dialect = MetaDialect(
        keys=tuple(meta),
        row_keys=tuple(rows[0]) if rows and isinstance(rows[0], dict) else MetaDialect.row_keys,
        entries={k: v for k, v in meta.items() if k not in ("num_experts", "step", "experts", "deleted")},
    )
    own = {"meta": _META_DIALECT.dump_python(dialect, mode="json")}
    usual = replace(dialect, entries={k: v for k, v in dialect.entries.items() if k != "source_checkpoint"})
    carried = {} if usual == MetaDialect() else own
    return replace(origin, dialects={**origin.dialects, **carried}, local=own)


def _recorded_meta(origin: Origin) -> MetaDialect:
    try:
        return _META_DIALECT.validate_python(origin.dialects.get("meta") or origin.local.get("meta") or MetaDialect())
    except ValidationError:
        raise InconsistentError("is no spelling of meta.json", key="vraxion_ckpt.dialects.meta") from None


def _fresh_rows(checkpoint: Checkpoint) -> dict[int, Lifecycle]:
    return {i: Lifecycle.fresh(checkpoint.step) for i in range(checkpoint.num_experts)}


# --- tensors ---


def _tied_across_files(checkpoint: Checkpoint) -> set[str]:
    """Name the experts' tensors that are the same memory as a tensor of another file."""
    if checkpoint.head is None or checkpoint.head.kind is HeadKind.SINGLE:
        return set()
    slots = checkpoint.optimizer.state if checkpoint.optimizer else {}
    in_router = (tensor for _, tensor in named_tensors([checkpoint.core, checkpoint.payload, slots]))
    # Experts that were not opened come from files of their own.
    owner: dict[int, int | None] = {tensor.data_ptr(): None for tensor in in_router if tensor.numel()}
    tied: set[str] = set()
    for i, expert in checkpoint.head.experts.items():
        for leaf, tensor in expert.items() if expert.is_open else ():
            if tensor.numel() and owner.setdefault(tensor.data_ptr(), i) != i:
                tied.add(checkpoint.head.prefix(i) + leaf)
    return tied


def _compact(tensor: Tensor) -> Tensor:
    """Return a tensor whose storage holds nothing else: torch.save writes whole storages."""
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize:
        return tensor
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


@hookimpl
def register_adapters() -> list[type[Adapter]]:
    """Offer the format."""
    return [ModularAdapter]
