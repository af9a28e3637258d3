"""The files from which a checkpoint was read: detect changes and verify checksums.

Opening a checkpoint maps its files and reads almost nothing. So readers register every file here, and both checks run
before a result is committed. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from vraxion_ckpt.errors import ChangedError, CorruptError


@dataclass(frozen=True)
class Fingerprint:
    """The file attributes that change when a file is written or replaced."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """Return the fingerprint of a file."""
        status = path.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


# A range of memory of this process: address and size in bytes.
Extent = tuple[int, int]


@dataclass(frozen=True)
class MappedPart:
    """A memory-mapped part of a file that has a checksum.

    Attributes:
        note: records a CRC-32 that was computed elsewhere, so that `SourceFile.verify` need not read the part again.
            Returns whether it equals the CRC-32 that the file states. A difference is not an error yet, because mapped
            memory may have been written to. `SourceFile.verify` then reads the part from the file.
        memory: the object that keeps the part mapped.
    """

    note: Callable[[int], bool]
    memory: Any


@dataclass(frozen=True)
class SourceFile:
    """One file that was read, with its fingerprint from before it was opened."""

    path: Path
    fingerprint: Fingerprint
    verify: Callable[[], None] | None = None
    parts: Mapping[Extent, MappedPart] = field(default_factory=dict)


@dataclass
class Sources:
    """All files read so far. Grows when a closed expert opens its shard."""

    files: list[SourceFile] = field(default_factory=list)
    _verified: int = field(default=0, init=False)
    _call: Callable[[Callable[[], None]], None] | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[SourceFile]:
        return iter(self.files)

    def add(
        self,
        path: Path,
        fingerprint: Fingerprint,
        verify: Callable[[], None] | None = None,
        parts: Mapping[Extent, MappedPart] | None = None,
    ) -> None:
        """Register a file.

        Args:
            path: the file.
            fingerprint: the file's fingerprint from before it was read.
            verify: raises `CorruptError` if a checksum is wrong. It skips parts that `MappedPart.note` has confirmed.
            parts: the mapped parts that have checksums, by memory range.
        """
        self.files.append(SourceFile(path, fingerprint, self._through(verify), parts or {}))

    def verify_through(self, call: Callable[[Callable[[], None]], None]) -> None:
        """Call the `verify` function of every file, including files that are added later, through `call`."""
        self._call = call
        self.files[:] = [replace(source, verify=self._through(source.verify)) for source in self.files]

    def _through(self, verify: Callable[[], None] | None) -> Callable[[], None] | None:
        return verify if verify is None or self._call is None else partial(self._call, verify)

    def parts(self) -> dict[Extent, MappedPart]:
        """Return the mapped parts of all files."""
        return {place: part for source in self.files for place, part in source.parts.items()}

    def verify(self) -> None:
        """Verify the checksums of every file that was added since the last call.

        Raises:
            CorruptError: a checksum is wrong. The error names the file and the part.
            ChangedError: a checksum is wrong, and a file has changed since it was opened.
        """
        while self._verified < len(self.files):
            source = self.files[self._verified]
            if source.verify is not None:
                try:
                    source.verify()
                except CorruptError:
                    self.check_unchanged()
                    raise
            self._verified += 1

    def check_unchanged(self) -> None:
        """Compare every file with its fingerprint.

        Raises:
            ChangedError: a file is gone, replaced or written to. The error names the first such file.
        """
        for source in self.files:
            try:
                now = Fingerprint.of(source.path)
            except OSError:
                now = None
            if now != source.fingerprint:
                raise ChangedError(
                    "changed while it was being read",
                    path=source.path,
                    written=(),
                    hint="wait until the trainer has finished saving, then run again",
                )
