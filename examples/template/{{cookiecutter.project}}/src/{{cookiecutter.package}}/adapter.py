"""One ``.npz`` file with an array for each tensor, and a JSON document with their names and everything else."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from vraxion_ckpt.plugin_api import (
    Adapter,
    Checkpoint,
    CkptError,
    CorruptError,
    InconsistentError,
    ReadContext,
    StorageError,
    document_text,
    dump_document,
    hookimpl,
    load_document,
    parse_json,
)

DOCUMENT = "document"
# Dtypes that torch and numpy share. The document stores tensors of other dtypes as bytes.
DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64}
)


class FormatAdapter(Adapter):
    """One .npz file of numpy."""

    name: ClassVar[str] = "{{ cookiecutter.format }}"
    suffixes: ClassVar[tuple[str, ...]] = (".{{ cookiecutter.format }}",)

    @classmethod
    def detect(cls, path: Path) -> bool:
        try:
            with zipfile.ZipFile(path) as archive:
                return f"{DOCUMENT}.npy" in archive.namelist()
        except (OSError, zipfile.BadZipFile):
            return False

    def read(self, path: Path, context: ReadContext) -> Checkpoint:
        try:
            with context.open(path) as file, np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
        except CkptError:
            raise
        except Exception as error:  # numpy raises several classes for a damaged file
            raise CorruptError(f"numpy cannot read the file: {error}", path=path) from error
        if DOCUMENT not in arrays:
            raise InconsistentError(f"has no array named {DOCUMENT}", path=path)
        text = arrays.pop(DOCUMENT).tobytes().decode(errors="replace")
        facts = parse_json(text, path)
        if not isinstance(facts, dict) or facts.keys() != {"names", "document"} or not isinstance(facts["names"], list):
            raise InconsistentError("the document must have exactly the keys names and document", path=path)
        if list(arrays) != [str(number) for number in range(len(facts["names"]))]:
            raise InconsistentError("the arrays do not match the names in the document", path=path)
        tensors = dict(zip(map(str, facts["names"]), map(torch.from_numpy, arrays.values()), strict=True))
        return load_document(tensors, facts["document"], path, self.name)

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        tensors, facts = dump_document(checkpoint, DTYPES, is_name=str.isprintable)
        text = document_text({"names": list(tensors), "document": facts})
        arrays = {
            str(number): tensor.detach().resolve_neg().contiguous().numpy()
            for number, tensor in enumerate(tensors.values())
        }
        arrays[DOCUMENT] = np.frombuffer(text.encode(), np.uint8)
        try:
            with path.open("xb") as file:
                np.savez(file, **arrays)
        except OSError as error:
            raise StorageError.from_os_error(error, path) from error


@hookimpl
def register_adapters() -> list[type[Adapter]]:
    """Register the format."""
    return [FormatAdapter]
