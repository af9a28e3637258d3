"""Modular directory: ``system/router.state``, ``experts/expert_<id>.pt``, ``experts/meta.json``.

``router.state`` holds the payload dict with every model tensor but ``head.experts.*`` and the optimizer of all
parameters, the experts' included; each shard is a plain dict of leaf name → tensor. ``meta.json`` has the lifecycle
rows, in one of two variants: the trainer's, with ``step`` and ``deleted``, and the offline exploder's, with
``source_checkpoint``. A single head stays in ``router.state``, and there are no shards.
"""

from __future__ import annotations

# MISSING torch_output
# MISSING without_meta
# MISSING torch_output
# MISSING without_meta
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from vraxion_ckpt.plugin_api import (
    ROUTER,
    VRAXION,
    Adapter,
    Checkpoint,
    Expert,
    Faults,
    Head,
    HeadKind,
    InconsistentError,
    IncrementalDirectoryAdapter,
    Loss,
    OutputFile,
    Parsed,
    ReadContext,
    StorageError,
    build_payload,
    dump_json,
    hookimpl,
    listed,
    make_extras,
    origin_of,
    parse_payload,
    progress_bar,
    recorded_dialect,
    router_dialect,
    split_head,
    with_head,
    write_new,
)
from vraxion_ckpt_adapters.modular.meta import (
    META,
    check_meta,
    is_without_rows,
    listed_as_deleted,
    parse_meta,
    parse_rows,
    read_meta,
    recorded_meta,
    row_to_json,
    rows_of,
    with_meta,
    without_meta,
)
from vraxion_ckpt_adapters.modular.shards import (
    SHARD,
    below,
    check_complete,
    check_file,
    check_fit,
    check_names,
    content_of,
    leaves_by_expert,
    leftovers,
    list_shards,
    load_shard,
    of_another_size,
    shard_name,
    tied_across_files,
    torch_output,
    warn_of_leftovers,
)

_ROUTER = "system/router.state"
_MANY = 64  # files are counted together; of fewer, which are larger, each tells how far it is


class ModularAdapter(IncrementalDirectoryAdapter):
    """Directory with system/router.state, a shard per expert, and meta.json."""

    name: ClassVar[str] = "modular"
    suffixes: ClassVar[tuple[str, ...]] = ("/",)
    loads_pickles: ClassVar[bool] = True
    index_file: ClassVar[str] = _ROUTER

    tenure_all: bool = Field(False, description="on writing, mark every expert tenured")

    @classmethod
    def detect(cls, path: Path) -> bool:
        return (_root(path) / _ROUTER).is_file()

    # --- read ---

    def read(self, path: Path, context: ReadContext) -> Checkpoint:
        return self._read(_Files(_root(path)), context)

    def read_overlay(self, path: Path, staged: Path, removed: Collection[str], context: ReadContext) -> Checkpoint:
        return self._read(_Files(_root(path), staged, frozenset(removed)), context)

    def examine(self, path: Path, faults: Faults, context: ReadContext) -> Checkpoint | None:
        files, looked = _Files(_root(path)), ReadContext(context.allow_globals)
        faults.attempt(files.check_links)
        if faults.errors:
            return None  # what lies outside is not opened
        router, place = files.path(_ROUTER), files.path(META)
        parsed = faults.attempt(lambda: parse_payload(looked.load_torch(router), router))
        meta = faults.attempt(lambda: parse_meta(place)) if place.is_file() else None
        faults.attempt(files.check_names)
        shards = files.shards()
        if parsed is not None:
            if meta is not None:
                faults.attempt(lambda: check_meta(meta, parsed, place))
            number = parsed.num_experts
            if any(name.startswith(VRAXION.single) for name in parsed.checkpoint.core):
                shards = {}
            elif number is not None and (shards or number > 1):
                shards = below(shards, number)
                listed = faults.attempt(lambda: listed_as_deleted(meta, number, files.root)) or frozenset()
                faults.attempt(lambda: check_complete(shards, listed, number, files.root))
                faults.attempt(lambda: parse_rows(meta, number, files.root) if meta else {})
        shards = {i: path for i, path in shards.items() if faults.attempt(partial(check_file, i, path)) is not None}
        leaves = leaves_by_expert(parsed.checkpoint.param_names) if parsed is not None else {}
        whole: tuple[int, dict[str, Tensor]] | None = None
        for expert, shard in shards.items():
            tensors = faults.attempt(partial(load_shard, shard, expert, leaves.get(expert), looked))
            if tensors is not None and whole is not None:
                faults.attempt(partial(check_fit, shard, expert, tensors, *whole))
            whole = whole or (None if tensors is None else (expert, tensors))
        for source in looked.sources:
            if source.verify is not None:
                faults.attempt(source.verify)
        return faults.attempt(lambda: self._read(files, context))

    def _read(self, files: _Files, context: ReadContext) -> Checkpoint:
        files.check_links()
        root, router = files.root, files.path(_ROUTER)
        parsed = parse_payload(context.load_torch(router), router)
        meta = read_meta(files.path(META), context, parsed)
        found = split_head(parsed.checkpoint, router)
        if found.head is not None and found.head.kind is HeadKind.EXPERTS:
            raise InconsistentError("holds head.experts.*, which belong into shards", path=router, key="model")
        files.check_names()
        shards = files.shards()
        num_experts = parsed.num_experts
        if num_experts is None:
            num_experts = meta["num_experts"] if meta else max(1, len(shards) if found.head is None else 1)
        listed = listed_as_deleted(meta, num_experts, root)
        single = found.head is not None
        left = leftovers(shards, 0 if single else num_experts)
        if found.head is None and (shards or num_experts > 1):
            head = self._sharded_head(root, below(shards, num_experts), num_experts, listed, parsed, router, context)
            found = with_head(found, head)
        elif single and num_experts != 1:
            raise InconsistentError(f"is {num_experts}, but the head is single", path=router, key="num_experts")
        if left:
            warn_of_leftovers(list(left), "the head is single" if single else f"num_experts is {num_experts}", root)
        origin = with_meta(origin_of(self.name, root, ROUTER, parsed.dialect, parsed.extras), meta)
        return replace(
            found,
            lifecycle=rows_of(found, meta, listed, root),
            origin=replace(origin, leftovers=tuple(f"experts/{path.name}" for path in left.values())),
        )

    def _sharded_head(
        self,
        root: Path,
        shards: dict[int, Path],
        num_experts: int,
        listed: frozenset[int],
        parsed: Parsed,
        router: Path,
        context: ReadContext,
    ) -> Head:
        for i, shard in shards.items():
            check_file(i, shard)
        check_complete(shards, listed, num_experts, root)
        leaves = leaves_by_expert(parsed.checkpoint.param_names)
        first: list[tuple[int, dict[str, Tensor]]] = []  # the shard that was opened first: what the others must fit

        def open_shard(expert: int, path: Path) -> dict[str, Tensor]:
            context.check_unchanged(router)  # the router: a shard must be of the same state
            tensors = load_shard(path, expert, leaves.get(expert), context)
            other = of_another_size(expert, tensors, shards)
            if not first and other is not None:
                more = load_shard(shards[other], other, leaves.get(other), context)
                (one, its), (two, others) = sorted([(expert, tensors), (other, more)], key=lambda pair: pair[0])
                check_fit(shards[two], two, others, one, its)
            first[:] = first or [(expert, tensors)]
            check_fit(path, expert, tensors, *first[0])
            return tensors

        def opener(expert: int, path: Path) -> Expert:
            return Expert(lambda: open_shard(expert, path))

        position = parsed.extras.head_position
        if position is None:
            position = _derived_position(list(parsed.checkpoint.core), parsed.checkpoint.param_names)
        if not 0 <= position <= len(parsed.checkpoint.core):
            raise InconsistentError("is beyond the state dict", path=root, key="head_position")
        experts = {i: opener(i, shards[i]) for i in sorted(shards)}
        return Head(HeadKind.EXPERTS, experts, position, listed.difference(shards))

    # --- write ---

    def dialect(self, checkpoint: Checkpoint) -> str:
        return str(recorded_dialect(checkpoint, ROUTER) or "")

    def losses(self, checkpoint: Checkpoint) -> list[Loss]:
        tied = sorted(tied_across_files(checkpoint))
        lost = []
        if tied:
            lost.append(Loss(f"tied tensors {listed(tied, 3)}", "each shard is a file of its own, with its own copy"))
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
        files = self.output_files(checkpoint)
        with progress_bar("writing", len(files), "files") if len(files) > _MANY else nullcontext(_uncounted) as count:
            for name, file in files.items():
                file.write(path / name)
                count(1)

    def size(self, checkpoint: Checkpoint) -> int:
        return sum(file.size() for file in self.output_files(checkpoint).values())

    def output_files(self, checkpoint: Checkpoint) -> dict[str, OutputFile]:
        head = checkpoint.head
        meta = self._meta(checkpoint)
        files = {_ROUTER: torch_output(object(), lambda: self._router(checkpoint))}  # taken to differ always
        if head is not None and head.kind is HeadKind.EXPERTS:
            for i, expert in head.experts.items():
                files[f"experts/{shard_name(i)}"] = torch_output(expert, partial(content_of, expert))
        files[META] = OutputFile(meta, lambda path: write_new(path, dump_json(meta)), lambda: len(dump_json(meta)))
        return files

    def is_ignored(self, name: str, before: Checkpoint, after: Checkpoint, reader: Checkpoint) -> bool:
        if name == META:  # a loader takes the rows of its experts, by their place, and nothing else
            if "meta" not in before.origin.local:
                return False  # there was none, and a loader that finds none makes rows up
            old, new = self._meta(before), self._meta(after)
            rows = slice(0, reader.num_experts)
            return bool(old["experts"][rows] == new["experts"][rows] and old.get("step") == new.get("step"))
        shard = SHARD.fullmatch(Path(name).name)
        if reader.head is None or reader.head.kind is HeadKind.SINGLE:
            return shard is not None
        return shard is not None and int(shard[1]) >= reader.num_experts

    def _router(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the payload that router.state holds."""
        head = checkpoint.head
        sharded = head is not None and head.kind is HeadKind.EXPERTS
        state = checkpoint.core if sharded else checkpoint.state_dict()
        router, origin = router_dialect(checkpoint)
        derived = _derived_position(list(state), checkpoint.param_names)
        position = head.position if head and sharded and head.position != derived else None
        extras = make_extras(checkpoint, router, without_meta(origin), head_position=position)
        return build_payload(checkpoint, state, router, extras)

    def _meta(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return meta.json in the variant the source had, or the exploder's."""
        origin = checkpoint.origin
        dialect = recorded_meta(origin)
        rows = {} if is_without_rows(checkpoint, dialect) else checkpoint.lifecycle
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
        entries["experts"] = [row_to_json(i, row, dialect.row_keys) for i, row in sorted(rows.items())]
        return {key: entries[key] for key in keys if key in entries}

    def foreign_files(self, path: Path) -> list[Path]:
        """List what is neither a folder of the layout nor one of its files."""
        if not path.is_dir():
            return []
        ours = {path / "system", path / "experts", path / _ROUTER, path / META}
        return [
            entry
            for entry in sorted(path.rglob("*"))
            if entry not in ours and not (entry.parent == path / "experts" and _is_shard(entry))
        ]


def _uncounted(_: int) -> None: ...


def _is_shard(path: Path) -> bool:
    return SHARD.fullmatch(path.name) is not None and (path.is_symlink() or not path.is_dir())


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

    def check_links(self) -> None:
        """Refuse a folder or a file that is a link out of the directory."""
        for place in (self.root / "system", self.path(_ROUTER), self.root / "experts", self.path(META)):
            if place.is_symlink() and not place.resolve().is_relative_to(self.root.resolve()):
                raise InconsistentError("is a link that leads out of the checkpoint", path=place)

    def check_names(self) -> None:
        """Refuse a shard with a name that a loader does not look for."""
        check_names(self.root / "experts")

    def shards(self) -> dict[int, Path]:
        """List the shards by expert; opens none."""
        found = list_shards(self.root / "experts")
        found = {i: path for i, path in found.items() if f"experts/{path.name}" not in self.removed}
        return found | (list_shards(self.staged / "experts") if self.staged else {})


def _derived_position(core: list[str], param_names: tuple[str, ...] | None) -> int:
    """Return where the head stands among the core tensors, as param_names tells; last if it does not."""
    names = list(param_names or ())
    head = [i for i, name in enumerate(names) if name.startswith("head.experts.")]
    following = names[head[-1] + 1 :] if head else []
    places = {name: place for place, name in enumerate(core)}
    return next((places[name] for name in following if name in places), len(core))


@hookimpl
def register_adapters() -> list[type[Adapter]]:
    """Offer the format."""
    return [ModularAdapter]
