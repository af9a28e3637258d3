"""A folder with a ``.npy`` file for each tensor, and ``manifest.json`` with the file names and everything else."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.lib.format import read_array_header_1_0, read_magic
from torch import Tensor

from vraxion_ckpt.plugin_api import (
    Adapter,
    Checkpoint,
    CkptError,
    CorruptError,
    InconsistentError,
    ReadContext,
    StorageError,
    dump_document,
    dump_json,
    hookimpl,
    load_document,
    write_new,
)

MANIFEST = "manifest.json"
# The dtypes that torch and numpy share. The document stores tensors of other dtypes as bytes.
DTYPES = frozenset(
    {
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    }
)
_FILE = re.compile(r"\d{5,8}\.npy")


class NpyAdapter(Adapter):
    """Folder of .npy files with a JSON manifest."""

    name: ClassVar[str] = "npy"
    suffixes: ClassVar[tuple[str, ...]] = (".npyd/",)

    @property
    def is_directory(self) -> bool:
        return True

    @classmethod
    def detect(cls, path: Path) -> bool:
        return (path / MANIFEST).is_file()

    def read(self, path: Path, context: ReadContext) -> Checkpoint:
        manifest = _read_manifest(path / MANIFEST, context)
        tensors = {name: _read_tensor(path / file, context) for name, file in manifest["files"].items()}
        return load_document(tensors, manifest["document"], path, self.name)

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        tensors, facts = dump_document(checkpoint, DTYPES, is_name=_is_name)
        files = {name: f"{number:05d}.npy" for number, name in enumerate(tensors)}
        for name, tensor in tensors.items():
            _write_tensor(tensor, path / files[name])
        write_new(path / MANIFEST, dump_json({"format": "npy", "version": 1, "files": files, "document": facts}))

    def foreign_files(self, path: Path) -> list[Path]:
        known = {MANIFEST}
        with suppress(CkptError):  # without a readable manifest, every file is foreign
            known |= set(_read_manifest(path / MANIFEST, ReadContext())["files"].values())
        return sorted(entry for entry in path.iterdir() if entry.name not in known)


def _is_name(name: str) -> bool:
    """Return whether a tensor name can be a JSON key. Lone surrogates cannot be encoded."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_manifest(path: Path, context: ReadContext) -> dict[str, Any]:
    _refuse_link(path)
    manifest = context.load_json(path)
    if not isinstance(manifest, dict) or manifest.keys() != {"format", "version", "files", "document"}:
        raise InconsistentError(
            "the manifest must have exactly the keys format, version, files and document", path=path
        )
    if (manifest["format"], manifest["version"]) != ("npy", 1):
        raise InconsistentError("the manifest must have format npy and version 1", path=path)
    files = manifest["files"]
    if not isinstance(files, dict) or not all(isinstance(f, str) and _FILE.fullmatch(f) for f in files.values()):
        raise InconsistentError("files must name a file like 00001.npy for each tensor", path=path, key="files")
    return manifest


def _refuse_link(path: Path) -> None:
    """Raise InconsistentError for a symbolic link, which may lead out of the folder."""
    if path.is_symlink():
        raise InconsistentError("must not be a symbolic link", path=path)


def _read_tensor(path: Path, context: ReadContext) -> Tensor:
    """Map a file as a tensor. Data is read when it is needed; writing to the tensor does not change the file."""
    _refuse_link(path)
    try:
        with context.open(path) as file:
            if read_magic(file) != (1, 0):
                raise CorruptError("must be a .npy file of version 1.0", path=path)
            shape, in_columns, dtype = read_array_header_1_0(file)
            offset = file.tell()
        count = math.prod(shape)
        if in_columns or dtype.hasobject or offset + count * dtype.itemsize != path.stat().st_size:
            raise CorruptError("the header does not match the size or layout of the data", path=path)
        # numpy cannot map an empty array.
        array = np.memmap(path, dtype, "c", offset, shape) if count else np.empty(shape, dtype)
        tensor = torch.from_numpy(np.asarray(array))
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    except CkptError:
        raise
    except Exception as error:  # numpy raises several classes for a damaged header
        raise CorruptError(f"numpy cannot read the file: {error}", path=path) from error
    return tensor


def _write_tensor(tensor: Tensor, path: Path) -> None:
    array = tensor.detach().resolve_conj().resolve_neg().contiguous().numpy()
    try:
        with path.open("xb") as file:
            np.save(file, array, allow_pickle=False)
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error


@hookimpl
def register_adapters() -> list[type[Adapter]]:
    """Register the format."""
    return [NpyAdapter]
