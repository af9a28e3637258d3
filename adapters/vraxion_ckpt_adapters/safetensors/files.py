"""Find the file to read in a folder, and read a checkpoint that is a single file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from vraxion_ckpt.plugin_api import (
    OUR_KEY,
    CorruptError,
    InconsistentError,
    ReadContext,
    TensorRef,
    check_safetensors,
    parse_json,
)

INDEX_SUFFIX = ".safetensors.index.json"
INDEX_FILE = f"model{INDEX_SUFFIX}"
MODEL_FILE = "model.safetensors"
# The metadata key of the save's id, which the index and all shards of a save have in common.
SAVE_KEY = f"{OUR_KEY}_save"
# The metadata key under which torch states where the slices of a distributed save begin.
SLICES_KEY = "DCP_SHARDING_INFO"
_SHARD = re.compile(r".*-[0-9]{5}-of-([0-9]{5})(\..*)?\.safetensors")


def list_indexes(folder: Path) -> list[Path]:
    """Return the index files of a folder."""
    return sorted(folder.glob(f"*{INDEX_SUFFIX}"))


def file_to_open(path: Path) -> Path:
    """Return the file to open first: `path` itself, or a folder's index or only file.

    The usual names go before others, as in Hugging Face's own tools.

    Raises:
        InconsistentError: the folder has more than one candidate, or none.
    """
    if not path.is_dir():
        return path
    usual = [file for file in (path / INDEX_FILE, path / MODEL_FILE) if file.exists()]
    found = usual or list_indexes(path)
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise InconsistentError(f"the folder holds {names}", path=path, hint="give the path of the one to read")
    return check_regular(found[0] if found else path / MODEL_FILE)


def check_regular(path: Path) -> Path:
    """Check the file of an index or shard, and return its path.

    Raises:
        InconsistentError: the file is missing, is not a regular file, or is a link to another folder.
    """
    if path.is_symlink() and Path(os.path.realpath(path)).parent != Path(os.path.realpath(path.parent)):
        hint = "copy the folder with cp -rL, which follows links"
        raise InconsistentError("is a link that leads out of the checkpoint", path=path, hint=hint)
    if not path.exists():
        raise InconsistentError("is missing", path=path)
    if not path.is_file():
        raise InconsistentError("must be a regular file", path=path)
    return path


def read_single_file(path: Path, context: ReadContext) -> tuple[dict[str, TensorRef], dict[str, Any]]:
    """Return the tensors and the metadata of a checkpoint that is one file.

    Raises:
        InconsistentError: the file is one of several shards, or may have slices, or the JSON under ``vraxion_ckpt`` is
            malformed.
    """
    header = check_safetensors(path)
    shard = _SHARD.fullmatch(path.name)
    if SAVE_KEY in header.metadata or (shard and int(shard[1]) > 1 and OUR_KEY not in header.metadata):
        raise InconsistentError(
            "is one of several shards, with a part of the tensors", path=path, hint="open their folder or its index"
        )
    if SLICES_KEY in header.metadata:
        message = "is a file of a distributed save, which may have slices of tensors under the names of the tensors"
        raise InconsistentError(message, path=path, hint="open the folder with the files of all ranks")
    tensors, texts = context.load_safetensors_references(path, header)
    metadata = dict[str, Any](texts)
    if OUR_KEY in metadata:
        try:
            metadata[OUR_KEY] = parse_json(header.metadata[OUR_KEY], path)
        except (CorruptError, InconsistentError) as error:
            raise InconsistentError(f"does not parse: {error.message}", path=path, key=OUR_KEY) from error
    return tensors, metadata
