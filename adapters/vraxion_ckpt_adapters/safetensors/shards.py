"""Read and fill the shards of a folder, and read the index that lists them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vraxion_ckpt.plugin_api import (
    LARGEST_SAFETENSORS_HEADER,
    OUR_PREFIX,
    InconsistentError,
    ReadContext,
    TensorRef,
    check_safetensors,
    checksum,
    document_text,
    load_json,
)
from vraxion_ckpt_adapters.safetensors.files import SAVE_KEY, check_regular
from vraxion_ckpt_adapters.safetensors.slices import check_whole


def read_shards(index: Path, context: ReadContext) -> tuple[dict[str, TensorRef], dict[str, Any]]:
    """Return the tensors of all shards and the metadata of the index. Headers are checked before any tensor is read.

    Raises:
        InconsistentError: the index and the shards do not agree, or are parts of different saves.
    """
    context.register(index)
    weight_map, metadata = read_index(index)
    files = dict.fromkeys(weight_map.values())
    headers = {name: check_safetensors(check_regular(index.with_name(name))) for name in files}
    for file, header in headers.items():
        for name in header.tensors:
            if weight_map.get(name) != file:
                listed = f"lists it in {weight_map[name]}" if name in weight_map else "does not list it"
                raise InconsistentError(f"the tensor is in {file}, but the index {listed}", path=index, key=name)
        if header.metadata.get(SAVE_KEY) != metadata.get(SAVE_KEY):
            raise InconsistentError("the shard belongs to another save than the index", path=index.with_name(file))
    for name, file in weight_map.items():
        if name not in headers[file].tensors:
            raise InconsistentError(f"the index lists the tensor in {file}, which lacks it", path=index, key=name)
    total = sum(entry.nbytes for header in headers.values() for entry in header.tensors.values())
    stated = metadata.pop("total_size", total)
    if stated != total:
        message = f"total_size is {stated!r}, but the shards hold {total} bytes"
        raise InconsistentError(message, path=index, key="metadata.total_size")
    for name in (SAVE_KEY, "total_parameters"):  # not carried over: a transform could make them wrong
        metadata.pop(name, None)
    tensors: dict[str, TensorRef] = {}
    for file, header in headers.items():
        found = context.load_safetensors_references(index.with_name(file), header)[0]
        check_whole(index.with_name(file), header.metadata, found)
        tensors |= found
    return tensors, metadata


def read_index(index: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the weight map and the metadata of an index.

    Raises:
        InconsistentError: the index is malformed, or names a file outside its folder.
    """
    check_regular(index)
    content = load_json(index, most=LARGEST_SAFETENSORS_HEADER)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise InconsistentError("must be an object with a weight_map of tensor → file", path=index)
    metadata = content.get("metadata", {})
    if not isinstance(metadata, dict):
        raise InconsistentError("metadata must be an object", path=index, key="metadata")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0")
        if not plain or file.startswith("."):
            message = f"the index lists the tensor in {file!r}, which is not a safetensors file of its folder"
            raise InconsistentError(message, path=index, key=name)
    return weight_map, metadata


def save_id(tensors: Mapping[str, TensorRef], facts: Mapping[str, Any]) -> str:
    """Return a digest of all content, 16 hexadecimal digits. It shows whether shards belong to one save."""
    digest = hashlib.sha256(document_text(facts).encode())
    for name, tensor in tensors.items():
        digest.update(
            repr((name, str(tensor.dtype), tuple(tensor.shape), checksum(tensor))).encode(errors="backslashreplace")
        )
    return digest.hexdigest()[:16]


def fill_shards(tensors: Mapping[str, TensorRef], max_bytes: int) -> Iterator[dict[str, TensorRef]]:
    """Divide tensors into shards of at most `max_bytes`, in order. A larger tensor has a shard of its own.

    Model tensors come first. Training state follows in separate shards.
    """
    shard: dict[str, TensorRef] = {}
    size, ours = 0, False
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0].startswith(OUR_PREFIX)):
        more = tensor.numel() * tensor.itemsize
        if shard and (size + more > max_bytes or name.startswith(OUR_PREFIX) != ours):
            yield shard
            shard, size = {}, 0
        ours = name.startswith(OUR_PREFIX)
        shard[name] = tensor
        size += more
    if shard:
        yield shard
