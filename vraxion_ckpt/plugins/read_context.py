"""Open files for an adapter and register each of them.

A conversion stops if a registered file changes before the result is committed, and verifies the checksums that the
file contains. An adapter that opens its files through a `ReadContext` cannot forget to register one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vraxion_ckpt.checkpoint.dialects import Dialect
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.source_files import Fingerprint, Sources
from vraxion_ckpt.checkpoint.tensor_dict import resolved
from vraxion_ckpt.errors import InconsistentError, StorageError
from vraxion_ckpt.formats import safetensors_file, torch_reader
from vraxion_ckpt.support import json_files

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ReadContext:
    """The options of one read, and functions that open and register files for an adapter.

    An adapter may keep the context to open further files later, such as the tensors of an expert.

    Attributes:
        allow_globals: full names of classes that a pickle may use in addition to plain data.
        sources: every file that was opened so far.
        drop_keys: entries of the payload that the user leaves out.
        dropped: those of them that `load_payload` has left out.
        trainers: the declared dialects of trainers.
    """

    allow_globals: tuple[str, ...] = ()
    sources: Sources = field(default_factory=Sources)
    drop_keys: tuple[str, ...] = ()
    dropped: set[str] = field(default_factory=set)
    trainers: tuple[Dialect, ...] = ()

    def load_torch(self, path: Path) -> Any:
        """Load a file of ``torch.save`` on the CPU without running code from it.

        Returns:
            Plain data (dicts, lists, tuples, strings, numbers, None) and tensors. The tensors are views of the mapped
            file.

        Raises:
            SourceError: the file is damaged, unsafe or not supported.
        """
        return resolved(self.load_torch_references(path))

    def load_torch_references(self, path: Path) -> Any:
        """Load a file of ``torch.save`` as `load_torch` does, but with a `TensorRef` for each tensor.

        Nothing is mapped. Tensors at which nobody looks are copied from file to file. Raises the same errors.
        """
        return torch_reader.load_torch_references(path, self.sources, self.allow_globals)

    def load_payload(self, path: Path) -> Any:
        """Load the file of ``torch.save`` that has the payload, as `load_torch_references` does.

        An entry that cannot be read is left out if the user drops it. Entries that can be read are dropped later, in
        every format. Raises the same errors.
        """
        value, dropped = torch_reader.load_torch_payload(path, self.sources, self.allow_globals, self.drop_keys)
        self.dropped.update(dropped)
        return value

    def load_safetensors(
        self, path: Path, header: safetensors_file.Header | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Map a safetensors file.

        Args:
            path: the file.
            header: the header of the file, if it was read already.

        Returns:
            The tensors by name, as views of the mapped file, and the metadata.

        Raises:
            SourceError: the file is damaged or not supported.
        """
        references, metadata = self.load_safetensors_references(path, header)
        return resolved(references), metadata

    def load_safetensors_references(
        self, path: Path, header: safetensors_file.Header | None = None
    ) -> tuple[dict[str, TensorRef], dict[str, str]]:
        """Open a safetensors file as `load_safetensors` does, but return a `TensorRef` for each tensor."""
        found = header if header is not None else safetensors_file.check_safetensors(path)
        return safetensors_file.load_safetensors(path, found, self.sources), dict(found.metadata)

    def load_json(self, path: Path) -> Any:
        """Read a JSON file strictly.

        Raises:
            SourceError: the file is not a regular file, is too large, or is not JSON.
        """
        self.register(path)
        return json_files.load_json(path)

    def open(self, path: Path) -> BinaryIO:
        """Open a regular file for reading, in binary mode.

        Raises:
            InconsistentError: the file is missing or is not a regular file.
            StorageError: the operating system cannot open it.
        """
        self.register(path)
        try:
            return path.open("rb")
        except OSError as error:
            raise StorageError.from_os_error(error, path) from error

    def check_unchanged(self, path: Path) -> None:
        """Check that a registered file has not changed since it was registered.

        Raises:
            ChangedError: the file was written to, replaced or removed.
        """
        for source in self.sources.at(path):
            source.check_unchanged()

    def register(self, path: Path) -> None:
        """Register a file that is about to be opened by other means, such as a library that takes a path.

        Raises:
            InconsistentError: the file is missing or is not a regular file.
        """
        if not path.exists():
            raise InconsistentError("is missing", path=path)
        if not path.is_file():
            raise InconsistentError("must be a regular file", path=path)
        self.sources.add(path, Fingerprint.of(path))
