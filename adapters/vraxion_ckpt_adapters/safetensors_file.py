"""safetensors: one file, or shards with a Hugging Face index.

The model's tensors keep their state-dict names, so that any reader of the format can use the file as it is. The
optimizer's and the payload's tensors lie beside them under names that begin with ``vraxion_ckpt/``, and all that is
no tensor stands as JSON under ``vraxion_ckpt`` in ``__metadata__``: see `vraxion_ckpt.formats.document`.
A folder of shards has
``model-00001-of-0000N.safetensors`` and ``model.safetensors.index.json`` (``weight_map``: tensor → file), which also
holds the document; training state has shards of its own. Files that others wrote are read as a bare state dict.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ByteSize, Field
from torch import Tensor

from vraxion_ckpt.plugin_api import (
    LARGEST_SAFETENSORS_HEADER,
    NATIVE_DTYPES,
    OUR_KEY,
    OUR_PREFIX,
    Adapter,
    Checkpoint,
    CkptError,
    CorruptError,
    Faults,
    InconsistentError,
    Lifecycle,
    Loss,
    Origin,
    ReadContext,
    check_safetensors,
    checksum,
    document_text,
    dump_document,
    dump_json,
    from_state_dict,
    hookimpl,
    is_tensor_name,
    load_document,
    load_json,
    named_tensors,
    parse_json,
    safetensors_size,
    save_safetensors,
    sharing,
    starts_like_safetensors,
    unbound_state_dict,
    without_tied,
    write_new,
)

_Content = tuple[dict[str, Tensor], dict[str, str]]
_INDEX = ".safetensors.index.json"
_MODEL = "model.safetensors"
_SHARD = re.compile(r".*-[0-9]{5}-of-([0-9]{5})(\..*)?\.safetensors")
# In every shard and in the index: which save they are parts of.
_SAVE = f"{OUR_KEY}_save"


class SafetensorsAdapter(Adapter):
    """One file, or a folder of shards with a Hugging Face index."""

    name: ClassVar[str] = "safetensors"
    suffixes: ClassVar[tuple[str, ...]] = (".safetensors",)

    weights_only: bool = Field(False, description="on writing, leave optimizer and training state out")
    max_shard_size: ByteSize | None = Field(
        None, gt=0, description="write a folder of shards of at most this size, like 5GB, and an index"
    )

    @property
    def is_directory(self) -> bool:
        return self.max_shard_size is not None

    @classmethod
    def detect(cls, path: Path) -> bool:
        if path.is_dir():
            return any(_indexes(path)) or (path / _MODEL).is_file()
        return path.is_file() and (path.name.endswith(_INDEX) or starts_like_safetensors(path))

    # --- read ---

    def read(self, path: Path, context: ReadContext) -> Checkpoint:
        place = _find(path)
        if place.name.endswith(_INDEX):
            root = place.parent
            tensors, metadata = _read_shards(place, context)
        else:
            root = place
            tensors, metadata = _read_file(place, context)
        if OUR_KEY in metadata:
            found = load_document(tensors, metadata.pop(OUR_KEY), root, self.name)
        else:
            found = from_state_dict(tensors, root, self.name)
        return replace(found, origin=_with_metadata(found.origin, self.name, metadata))

    def examine(self, path: Path, faults: Faults, context: ReadContext) -> Checkpoint | None:
        place = faults.attempt(lambda: _find(path))
        if place is not None and place.name.endswith(_INDEX):
            index = faults.attempt(lambda: _read_index(place))
            for file in dict.fromkeys(index[0].values()) if index else ():
                faults.attempt(partial(_check_shard, place.with_name(file)))
        return super().examine(path, faults, context)

    def dialect(self, checkpoint: Checkpoint) -> str:
        root = checkpoint.origin.path
        return "shards and an index" if root is not None and root.is_dir() else "one file"

    # --- write ---

    def losses(self, checkpoint: Checkpoint) -> list[Loss]:
        overlapping = _overlapping(self.held(checkpoint))
        lost = []
        if overlapping:
            lost.append(Loss(f"the shared memory of {' and '.join(overlapping)}", "each is written whole"))
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
            write_new(path / f"model{_INDEX}", index)

    def size(self, checkpoint: Checkpoint) -> int:
        files, index = self._files(checkpoint)
        return sum(safetensors_size(*content) for content in files.values()) + len(index or b"")

    def _files(self, checkpoint: Checkpoint) -> tuple[dict[str, _Content], bytes | None]:
        """Return each file's tensors and metadata by its name, ``.`` for a single one, and the index of shards."""
        tensors, facts = dump_document(checkpoint, NATIVE_DTYPES, is_tensor_name)
        metadata = {"format": "pt", **_recorded_metadata(checkpoint.origin, self.name)}
        if self.max_shard_size is None:
            texts = {key: text for key, text in metadata.items() if isinstance(text, str)}
            return {".": (dict(tensors), {**texts, OUR_KEY: document_text(facts)})}, None
        save = _digest(tensors, facts)
        shards = list(_shards(tensors, self.max_shard_size))
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        head = {**metadata, "total_size": total, _SAVE: save, OUR_KEY: facts}
        files = {name: (shard, {"format": "pt", _SAVE: save}) for name, shard in zip(names, shards, strict=True)}
        return files, dump_json({"metadata": head, "weight_map": weight_map})

    def foreign_files(self, path: Path) -> list[Path]:
        """List what is neither an index nor a shard that it names."""
        known: set[str] = set()
        for index in _indexes(path):
            try:
                known |= {index.name, *_read_index(index)[0].values()}
            except CkptError:  # then its shards are not known to be ours either
                known.add(index.name)
        if not path.is_dir():
            return []
        return sorted(entry for entry in path.iterdir() if entry.name not in known or not entry.is_file())


# --- where things are ---


def _indexes(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_INDEX}"))


def _find(path: Path) -> Path:
    """Return the file to begin with: the index of a folder, or the one file."""
    if not path.is_dir():
        return path
    indexes = _indexes(path)
    usual = path / f"model{_INDEX}"
    found = [usual] if usual in indexes else indexes
    if (path / _MODEL).exists():
        found.append(path / _MODEL)
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise InconsistentError(f"holds {names}", path=path, hint="name the one to read")
    return _regular(found[0] if found else path / _MODEL)


def _read_file(path: Path, context: ReadContext) -> tuple[dict[str, Tensor], dict[str, Any]]:
    header = check_safetensors(path)
    shard = _SHARD.fullmatch(path.name)
    if _SAVE in header.metadata or (shard and int(shard[1]) > 1 and OUR_KEY not in header.metadata):
        raise InconsistentError(
            "is one of several shards, with a part of the tensors", path=path, hint="open their folder or its index"
        )
    tensors, texts = context.load_safetensors(path, header)
    metadata = dict[str, Any](texts)
    if OUR_KEY in metadata:
        try:
            metadata[OUR_KEY] = parse_json(header.metadata[OUR_KEY], path)
        except (CorruptError, InconsistentError) as error:
            raise InconsistentError(f"does not parse: {error.message}", path=path, key=OUR_KEY) from error
    return tensors, metadata


# --- shards ---


def _read_shards(index: Path, context: ReadContext) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Open every shard that an index names, after all of their headers fit it and each other."""
    context.register(index)
    weight_map, metadata = _read_index(index)
    headers = {name: check_safetensors(_regular(index.with_name(name))) for name in dict.fromkeys(weight_map.values())}
    for file, header in headers.items():
        for name in header.sizes:
            if weight_map.get(name) != file:
                where = f"the index says {weight_map[name]}" if name in weight_map else "the index does not list it"
                raise InconsistentError(f"is in {file}, and {where}", path=index, key=name)
        if header.metadata.get(_SAVE) != metadata.get(_SAVE):
            raise InconsistentError("belongs to another save than the index", path=index.with_name(file))
    for name, file in weight_map.items():
        if name not in headers[file].sizes:
            raise InconsistentError(f"is not in {file}, where the index says it is", path=index, key=name)
    total = sum(size for header in headers.values() for size in header.sizes.values())
    stated = metadata.pop("total_size", total)
    if stated != total:
        raise InconsistentError(f"is {stated!r}, the shards hold {total} bytes", path=index, key="metadata.total_size")
    for name in (_SAVE, "total_parameters"):  # what a transform would make untrue, too
        metadata.pop(name, None)
    tensors: dict[str, Tensor] = {}
    for file, header in headers.items():
        tensors |= context.load_safetensors(index.with_name(file), header)[0]
    return tensors, metadata


def _read_index(index: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return an index's weight map and metadata, after every file name in it was looked at."""
    _regular(index)
    content = load_json(index, most=LARGEST_SAFETENSORS_HEADER)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise InconsistentError("must be an object with a weight_map of tensor → file", path=index)
    metadata = content.get("metadata", {})
    if not isinstance(metadata, dict):
        raise InconsistentError("must be an object", path=index, key="metadata")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0")
        if not plain or file.startswith("."):
            raise InconsistentError(
                f"is said to be in {file!r}, which is no plain name of a safetensors file", path=index, key=name
            )
    return weight_map, metadata


def _check_shard(path: Path) -> None:
    check_safetensors(_regular(path))


def _regular(path: Path) -> Path:
    """Return the path of an index or a shard, if it is a regular file of the checkpoint's own folder."""
    if path.is_symlink() and Path(os.path.realpath(path)).parent != Path(os.path.realpath(path.parent)):
        hint = "copy the folder with cp -rL, which follows links"
        raise InconsistentError("is a link that leads out of the checkpoint", path=path, hint=hint)
    if not path.exists():
        raise InconsistentError("is missing", path=path)
    if not path.is_file():
        raise InconsistentError("must be a regular file", path=path)
    return path


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Return what tells a save from any other that differs in a bit: shards of two must not be mixed."""
    digest = hashlib.sha256(document_text(facts).encode())
    for name, tensor in tensors.items():
        digest.update(
            repr((name, str(tensor.dtype), tuple(tensor.shape), checksum(tensor))).encode(errors="backslashreplace")
        )
    return digest.hexdigest()[:16]


def _shards(tensors: Mapping[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """Fill shards in order, the model's tensors first and the others in shards of their own."""
    shard: dict[str, Tensor] = {}
    size, ours = 0, False
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0].startswith(OUR_PREFIX)):
        more = tensor.numel() * tensor.itemsize
        if shard and (size + more > most or name.startswith(OUR_PREFIX) != ours):
            yield shard
            shard, size = {}, 0
        ours = name.startswith(OUR_PREFIX)
        shard[name] = tensor
        size += more
    if shard:
        yield shard


# --- what others keep in the metadata ---


def _with_metadata(origin: Origin, format_name: str, metadata: Mapping[str, Any]) -> Origin:
    """Note what others keep there; the usual ``format`` need not be carried through other formats."""
    others = {key: text for key, text in metadata.items() if (key, text) != ("format", "pt")}
    others = {**_recorded_metadata(origin, format_name), **others}
    return origin.with_dialect(format_name, others) if others else origin


def _recorded_metadata(origin: Origin, format_name: str) -> dict[str, Any]:
    recorded = origin.dialect(format_name) or {}
    if not isinstance(recorded, dict):
        key = f"{OUR_KEY}.dialects.{format_name}"
        raise InconsistentError("is no metadata of a safetensors file", path=origin.path, key=key)
    return recorded


def _overlapping(checkpoint: Checkpoint) -> list[str]:
    """Name two tensors that share memory without being the same view of it, if there are any."""
    everything: dict[str, Any] = {"model": checkpoint.open_tensors()}
    if (unbound := unbound_state_dict(checkpoint)) is not None:
        everything["optimizer"] = unbound
    elif checkpoint.optimizer is not None:
        optimizer = checkpoint.optimizer
        everything["optimizer"] = optimizer.state
        everything["param_groups"] = [[group.options for group in optimizer.groups], optimizer.extra]
    everything |= {"payload": checkpoint.payload, "metadata": checkpoint.metadata}
    for group in sharing(named_tensors(everything)):
        views = [name for name, _ in without_tied(group)]
        if len(views) > 1:
            return views[:2]
    return []


@hookimpl
def register_adapters() -> list[type[Adapter]]:
    """Offer the format."""
    return [SafetensorsAdapter]
