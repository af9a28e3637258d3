"""Read and write safetensors files and folders of shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ByteSize, Field

from vraxion_ckpt.plugin_api import (
    NATIVE_DTYPE_NAMES,
    OUR_KEY,
    Adapter,
    Checkpoint,
    CkptError,
    Faults,
    InconsistentError,
    Lifecycle,
    Loss,
    Neighbour,
    Origin,
    ReadContext,
    TensorRef,
    check_safetensors,
    document_text,
    dump_document,
    dump_json,
    from_state_dict,
    is_tensor_name,
    load_document,
    named_references,
    safetensors_size,
    save_safetensors,
    sharing,
    starts_like_safetensors,
    unbound_state_dict,
    without_tied,
    write_new,
)
from vraxion_ckpt_adapters.safetensors.files import (
    INDEX_FILE,
    INDEX_SUFFIX,
    MODEL_FILE,
    SAVE_KEY,
    check_regular,
    file_to_open,
    list_indexes,
    read_single_file,
)
from vraxion_ckpt_adapters.safetensors.neighbours import sort_entries
from vraxion_ckpt_adapters.safetensors.shards import fill_shards, read_index, read_shards, save_id
from vraxion_ckpt_adapters.safetensors.slices import list_slices, read_slices

_UNLIMITED = 2**62  # bytes, more than any file has
_Content = tuple[dict[str, TensorRef], dict[str, str]]


class SafetensorsAdapter(Adapter):
    """One file, or a folder of shards with a Hugging Face index."""

    name: ClassVar[str] = "safetensors"
    suffixes: ClassVar[tuple[str, ...]] = (".safetensors",)

    weights_only: bool = Field(False, description="on writing, leave out optimizer and training state")
    max_shard_size: ByteSize | None = Field(
        None, gt=0, description="write a folder of shards of at most this size, like 5GB, and an index"
    )
    ranks: int | None = Field(
        None, ge=1, description="on reading slices of a distributed save: the number of ranks that saved them"
    )
    prefix: str | None = Field(None, description="on reading, what precedes the names of the head, such as module.")

    @property
    def is_directory(self) -> bool:
        return self.max_shard_size is not None

    @property
    def keeps_neighbours(self) -> bool:
        return self.is_directory

    @classmethod
    def detect(cls, path: Path) -> bool:
        if path.is_dir():
            return any(list_indexes(path)) or (path / MODEL_FILE).is_file() or any(list_slices(path))
        return path.is_file() and (path.name.endswith(INDEX_SUFFIX) or starts_like_safetensors(path))

    # --- read ---

    def read(self, path: Path, context: ReadContext) -> Checkpoint:
        root, metadata = path, dict[str, Any]()
        if _has_slices(path):
            tensors = read_slices(path, self.ranks, context)
        elif (place := file_to_open(path)).name.endswith(INDEX_SUFFIX):
            root = place.parent
            tensors, metadata = read_shards(place, context)
        else:
            tensors, metadata = read_single_file(place, context)
        if OUR_KEY in metadata:
            found = load_document(tensors, metadata.pop(OUR_KEY), root, self.name)
        else:
            found = from_state_dict(tensors, root, self.name, self.prefix)
            found = replace(found, origin=replace(found.origin, is_ordered=False))
        return replace(found, origin=_with_metadata(found.origin, self.name, metadata))

    def examine(self, path: Path, faults: Faults, context: ReadContext) -> Checkpoint | None:
        place = None if _has_slices(path) else faults.attempt(lambda: file_to_open(path))
        if place is not None and place.name.endswith(INDEX_SUFFIX):
            index = faults.attempt(lambda: read_index(place))
            for file in dict.fromkeys(index[0].values()) if index else ():
                faults.attempt(partial(_check_shard, place.with_name(file)))
        return super().examine(path, faults, context)

    def dialect(self, checkpoint: Checkpoint) -> str:
        root = checkpoint.origin.path
        if root is None or not root.is_dir():
            return "one file"
        if _has_slices(root):
            return "slices of a distributed save"
        return "one file in a folder" if file_to_open(root).name == MODEL_FILE else "shards and an index"

    def neighbours(self, path: Path) -> list[Neighbour]:
        return sort_entries(path, _own_files(path))[0] if path.is_dir() else []

    def foreign_files(self, path: Path) -> list[Path]:
        return sort_entries(path, _own_files(path))[1] if path.is_dir() else []

    def as_stored(self, path: Path) -> Adapter:
        if self.max_shard_size is not None or not path.is_dir():
            return self
        files = list_slices(path) if _has_slices(path) else []
        if not files and (index := file_to_open(path)).name.endswith(INDEX_SUFFIX):
            files = [index.with_name(name) for name in set(read_index(index)[0].values())]
        largest = max((sum(check_safetensors(file).sizes.values()) for file in files), default=_UNLIMITED)
        return self.model_copy(update={"max_shard_size": ByteSize(max(1, largest))})

    # --- write ---

    def losses(self, checkpoint: Checkpoint) -> list[Loss]:
        overlapping = _overlapping(self.held(checkpoint))
        lost = []
        if overlapping:
            lost.append(Loss(f"the shared memory of {' and '.join(overlapping)}", "each is written separately"))
        if self.weights_only:
            why = "weights_only leaves it out"
            has_optimizer = checkpoint.optimizer is not None or unbound_state_dict(checkpoint) is not None
            if has_optimizer:
                lost.append(Loss("the optimizer's state", why))
            if checkpoint.payload:
                lost.append(Loss(f"the payload's {', '.join(map(str, checkpoint.payload))}", why))
            if any(row != Lifecycle() and not row.assumed for row in checkpoint.lifecycle.values()):
                lost.append(Loss("the experts' lifecycle rows", why))
            if checkpoint.plan is not None:
                lost.append(Loss("the planned split", why))
        return lost

    def held(self, checkpoint: Checkpoint) -> Checkpoint:
        return checkpoint.without_training_state(keep_dialect=self.name) if self.weights_only else checkpoint

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        files, index = self._files(checkpoint)
        for name, (tensors, metadata) in files.items():
            save_safetensors(tensors, metadata, path / name)
        if index is not None:
            write_new(path / INDEX_FILE, index)

    def size(self, checkpoint: Checkpoint) -> int:
        files, index = self._files(checkpoint)
        return sum(safetensors_size(*content) for content in files.values()) + len(index or b"")

    def _files(self, checkpoint: Checkpoint) -> tuple[dict[str, _Content], bytes | None]:
        """Return the content of each file by name, and the index. A target that is a file is named ``.``."""
        named, facts = dump_document(checkpoint, NATIVE_DTYPE_NAMES, is_tensor_name)
        tensors = named.references()
        metadata = {"format": "pt", **_recorded_metadata(checkpoint.origin, self.name)}
        shards = list(fill_shards(tensors, self.max_shard_size)) if self.max_shard_size is not None else []
        if len(shards) < 2:
            texts = {key: text for key, text in metadata.items() if isinstance(text, str)}
            name = MODEL_FILE if self.is_directory else "."
            return {name: (tensors, {**texts, OUR_KEY: document_text(facts)})}, None
        save = save_id(tensors, facts)
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        head = {**metadata, "total_size": total, SAVE_KEY: save, OUR_KEY: facts}
        files = {name: (shard, {"format": "pt", SAVE_KEY: save}) for name, shard in zip(names, shards, strict=True)}
        return files, dump_json({"metadata": head, "weight_map": weight_map})


def _has_slices(path: Path) -> bool:
    """Return whether the weights in a folder are slices of a distributed save only."""
    return path.is_dir() and not (list_indexes(path) or (path / MODEL_FILE).exists()) and any(list_slices(path))


def _own_files(folder: Path) -> set[str]:
    """Return the names of the files with the weights of a folder, and of their index."""
    if _has_slices(folder):
        return {file.name for file in list_slices(folder)}
    try:
        place = file_to_open(folder)
        return {place.name, *(read_index(place)[0].values() if place.name.endswith(INDEX_SUFFIX) else ())}
    except CkptError:  # an unreadable index does not show which files are its shards
        return {file.name for file in list_indexes(folder)}


def _check_shard(path: Path) -> None:
    check_safetensors(check_regular(path))


def _with_metadata(origin: Origin, format_name: str, metadata: Mapping[str, Any]) -> Origin:
    """Add metadata that other software wrote to `origin`, except ``format: pt``, which is always written."""
    others = {key: text for key, text in metadata.items() if (key, text) != ("format", "pt")}
    others = {**_recorded_metadata(origin, format_name), **others}
    return origin.with_dialect(format_name, others) if others else origin


def _recorded_metadata(origin: Origin, format_name: str) -> dict[str, Any]:
    recorded = origin.dialect(format_name) or {}
    if not isinstance(recorded, dict):
        key = f"{OUR_KEY}.dialects.{format_name}"
        raise InconsistentError("the recorded safetensors metadata must be an object", path=origin.path, key=key)
    return recorded


def _overlapping(checkpoint: Checkpoint) -> list[str]:
    """Return the names of two tensors that are different views of the same memory, or an empty list."""
    everything: dict[str, Any] = {"model": checkpoint.open_references()}
    if (unbound := unbound_state_dict(checkpoint)) is not None:
        everything["optimizer"] = unbound
    elif checkpoint.optimizer is not None:
        optimizer = checkpoint.optimizer
        everything["optimizer"] = optimizer.state
        everything["param_groups"] = [[group.options for group in optimizer.groups], optimizer.extra]
    everything |= {"payload": checkpoint.payload, "metadata": checkpoint.metadata}
    for group in sharing(named_references(everything)):
        views = [name for name, _ in without_tied(group)]
        if len(views) > 1:
            return views[:2]
    return []
