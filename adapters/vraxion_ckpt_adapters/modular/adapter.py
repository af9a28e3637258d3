"""Read and write modular directories."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from vraxion_ckpt.plugin_api import (
    ROUTER,
    Checkpoint,
    Expert,
    Faults,
    Head,
    HeadKind,
    HeadNames,
    InconsistentError,
    IncrementalDirectoryAdapter,
    Loss,
    OutputFile,
    Parsed,
    ReadContext,
    StorageError,
    TensorRef,
    build_payload_references,
    listed,
    make_extras,
    origin_of,
    parse_payload,
    progress_bar,
    recorded_dialect,
    router_dialect,
    save_torch_file,
    split_head,
    torch_file_size,
    with_head,
    write_new,
)
from vraxion_ckpt_adapters.modular.layout import ROUTER_STATE, CheckpointFiles, foreign_files, root_of
from vraxion_ckpt_adapters.modular.meta import (
    META,
    check_meta,
    listed_as_deleted,
    meta_content,
    parse_meta,
    parse_rows,
    read_meta,
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
    leaves_by_expert,
    leftovers,
    load_shard,
    of_another_size,
    shard_name,
    shard_output,
    tied_across_files,
    warn_of_leftovers,
)

# With more files than this, progress counts files; with fewer, which are larger, each file shows its own progress.
_MANY = 64


class ModularAdapter(IncrementalDirectoryAdapter):
    """Directory with system/router.state, a shard per expert, and meta.json."""

    name: ClassVar[str] = "modular"
    suffixes: ClassVar[tuple[str, ...]] = ("/",)
    loads_pickles: ClassVar[bool] = True
    index_file: ClassVar[str] = ROUTER_STATE

    tenure_all: bool = Field(False, description="mark every expert as tenured in the written files")

    @classmethod
    def detect(cls, path: Path) -> bool:
        return (root_of(path) / ROUTER_STATE).is_file()

    # --- read ---

    def read(self, path: Path, context: ReadContext) -> Checkpoint:
        return self._read(CheckpointFiles(root_of(path)), context)

    def read_overlay(self, path: Path, staged: Path, removed: Collection[str], context: ReadContext) -> Checkpoint:
        return self._read(CheckpointFiles(root_of(path), staged, frozenset(removed)), context)

    def examine(self, path: Path, faults: Faults, context: ReadContext) -> Checkpoint | None:
        files = CheckpointFiles(root_of(path))
        trial = ReadContext(context.allow_globals, drop_keys=context.drop_keys, trainers=context.trainers)
        faults.attempt(files.check_links)
        if faults.errors:
            return None  # files outside the directory are never opened
        router, rows = files.path(ROUTER_STATE), files.path(META)
        parsed = faults.attempt(lambda: parse_payload(trial.load_payload(router), router, trial.trainers))
        meta = faults.attempt(lambda: parse_meta(rows)) if rows.is_file() else None
        shards, malformed = files.shards()
        faults.attempt(lambda: check_names(malformed))
        if parsed is not None:
            if meta is not None:
                faults.attempt(lambda: check_meta(meta, parsed, rows))
            number = parsed.num_experts
            if any(name.startswith(_names(parsed).single) for name in parsed.checkpoint.core):
                shards = {}
            elif number is not None and (shards or number > 1):
                shards = below(shards, number)
                listed = faults.attempt(lambda: listed_as_deleted(meta, number, files.root)) or frozenset()
                faults.attempt(lambda: check_complete(shards, listed, number, files.root))
                faults.attempt(lambda: parse_rows(meta, number, files.root) if meta else {})
        shards = {i: path for i, path in shards.items() if faults.attempt(partial(check_file, i, path)) is not None}
        leaves = leaves_by_expert(parsed.checkpoint.param_names, _names(parsed)) if parsed is not None else {}
        reference: tuple[int, dict[str, TensorRef]] | None = None  # the first readable shard
        for expert, place in shards.items():
            shard = Path(place)
            tensors = faults.attempt(partial(load_shard, shard, expert, leaves.get(expert), trial))
            if tensors is None:
                continue
            if reference is None:
                reference = expert, tensors
            faults.attempt(partial(check_fit, shard, expert, tensors, *reference))
        for source in trial.sources:
            if source.verify is not None:
                faults.attempt(source.verify)
        return faults.attempt(lambda: self._read(files, context))

    def _read(self, files: CheckpointFiles, context: ReadContext) -> Checkpoint:
        files.check_links()
        root, router = files.root, files.path(ROUTER_STATE)
        parsed = parse_payload(context.load_payload(router), router, context.trainers)
        meta = read_meta(files.path(META), context, parsed)
        names, found = _names(parsed), parsed.checkpoint
        if any(name.startswith((names.single, names.experts)) for name in found.core):
            found = split_head(found, router, prefix=names.prefix)
        if found.head is not None and found.head.kind is HeadKind.EXPERTS:
            message = f"{names.experts}* must be in shards, not in router.state"
            raise InconsistentError(message, path=router, key="model")
        shards, malformed = files.shards()
        check_names(malformed)
        num_experts = parsed.num_experts
        if num_experts is None:
            num_experts = meta["num_experts"] if meta else max(1, len(shards) if found.head is None else 1)
        listed = listed_as_deleted(meta, num_experts, root)
        single = found.head is not None
        left = leftovers(shards, 0 if single else num_experts)
        if found.head is None and (shards or num_experts > 1):
            needed = below(shards, num_experts)
            for i, shard in below(files.staged_shards() if files.staged else shards, num_experts).items():
                check_file(i, shard)  # an edit watches the others since they were read
            head = self._sharded_head(root, needed, num_experts, listed, parsed, router, context)
            found = with_head(found, head)
        elif single and num_experts != 1:
            message = f"num_experts is {num_experts}, but the head is single"
            raise InconsistentError(message, path=router, key="num_experts")
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
        shards: dict[int, str],
        num_experts: int,
        listed: frozenset[int],
        parsed: Parsed,
        router: Path,
        context: ReadContext,
    ) -> Head:
        check_complete(shards, listed, num_experts, root)
        param_names, names = parsed.checkpoint.param_names, _names(parsed)

        @cache
        def leaves() -> dict[int, set[str]]:
            return leaves_by_expert(param_names, names)

        reference: list[tuple[int, dict[str, TensorRef]]] = []  # the first shard that was opened

        def open_shard(expert: int) -> dict[str, TensorRef]:
            path = Path(shards[expert])
            context.check_unchanged(router)  # if it has changed, the shard may be from a later save
            tensors = load_shard(path, expert, leaves().get(expert), context)
            other = of_another_size(expert, tensors, shards)
            if not reference and other is not None:
                more = load_shard(Path(shards[other]), other, leaves().get(other), context)
                first, second = sorted([(expert, tensors), (other, more)], key=lambda pair: pair[0])
                check_fit(Path(shards[second[0]]), *second, *first)
            reference[:] = reference or [(expert, tensors)]
            check_fit(path, expert, tensors, *reference[0])
            return tensors

        position = parsed.extras.head_position
        if position is None:
            position = _derived_position(list(parsed.checkpoint.core), param_names, names)
        if not 0 <= position <= len(parsed.checkpoint.core):
            message = f"head_position is {position}, but there are only {len(parsed.checkpoint.core)} other tensors"
            raise InconsistentError(message, path=root, key="head_position")
        experts = {i: Expert(partial(open_shard, i)) for i in sorted(shards)}
        return Head(HeadKind.EXPERTS, experts, position, listed.difference(shards), names)

    # --- write ---

    def dialect(self, checkpoint: Checkpoint) -> str:
        return str(recorded_dialect(checkpoint, ROUTER) or "")

    def losses(self, checkpoint: Checkpoint) -> list[Loss]:
        tied = sorted(tied_across_files(checkpoint))
        lost = []
        if tied:
            lost.append(Loss(f"tied tensors {listed(tied, 3)}", "each expert's file has its own copy"))
        if checkpoint.head and list(checkpoint.head.experts) != sorted(checkpoint.head.experts):
            lost.append(Loss("the experts' order in the state dict", "shards are ordered by expert id"))
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
        router = partial(self._router, checkpoint)
        # router.state is always written: object() equals no other object, so it never counts as unchanged.
        files = {
            ROUTER_STATE: OutputFile(
                object(), lambda path: save_torch_file(router(), path), lambda: torch_file_size(router())
            )
        }
        if head is not None and head.kind is HeadKind.EXPERTS:
            files |= {f"experts/{shard_name(i)}": shard_output(expert) for i, expert in head.experts.items()}
        meta = meta_content(checkpoint)
        files[META] = OutputFile(meta, lambda path: write_new(path, meta.as_bytes()), lambda: len(meta.as_bytes()))
        return files

    def is_ignored(self, name: str, before: Checkpoint, after: Checkpoint, reader: Checkpoint) -> bool:
        if name == META:  # a loader uses only `step` and the first `num_experts` rows
            if "meta" not in before.origin.local:
                return False  # without meta.json, a loader assumes rows, so writing the file changes what it reads
            old, new = meta_content(before), meta_content(after)
            return old.loaded_rows(reader.num_experts) == new.loaded_rows(reader.num_experts) and old.step == new.step
        shard = SHARD.fullmatch(Path(name).name)
        if reader.head is None or reader.head.kind is HeadKind.SINGLE:
            return shard is not None
        return shard is not None and int(shard[1]) >= reader.num_experts

    def _router(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the payload of router.state."""
        head = checkpoint.head
        sharded = head is not None and head.kind is HeadKind.EXPERTS
        state = checkpoint.core.references() if sharded else checkpoint.state_references()
        router, origin = router_dialect(checkpoint)
        names = head.names if head else HeadNames()
        derived = _derived_position(list(state), checkpoint.param_names, names)
        position = head.position if head and sharded and head.position != derived else None
        extras = make_extras(
            checkpoint, router, without_meta(origin), head_position=position, head_prefix=names.prefix or None
        )
        return build_payload_references(checkpoint, state, router, extras)

    def foreign_files(self, path: Path) -> list[Path]:
        return foreign_files(path)


def _uncounted(_: int) -> None: ...


def _names(parsed: Parsed) -> HeadNames:
    return HeadNames.below(parsed.extras.head_prefix or "")


def _derived_position(core: list[str], param_names: tuple[str, ...] | None, names: HeadNames) -> int:
    """Return the index in `core` of the first core tensor after the head in `param_names`, else ``len(core)``."""
    params = list(param_names or ())
    head = [i for i, name in enumerate(params) if name.startswith(names.experts)]
    following = params[head[-1] + 1 :] if head else []
    places = {name: place for place, name in enumerate(core)}
    return next((places[name] for name in following if name in places), len(core))
