"""The files a checkpoint was read from: did they change meanwhile, and do their checksums hold?

Opening a checkpoint maps its files and reads almost nothing, so neither question can be answered then. A
reader registers every file here; whoever is about to commit a result asks both questions first.
Imports nothing of torch.
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
    """What changes when a file is written or replaced."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """Take the fingerprint of a file."""
        status = path.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


# A range of this process's memory: its address and its size in bytes.
Extent = tuple[int, int]


@dataclass(frozen=True)
class MappedPart:
    """A part of a file that is mapped and has a checksum.

    Attributes:
        note: takes the CRC-32 of the bytes from someone who has read them anyway, which saves `SourceFile.verify` the
            work. Returns whether it is the stated one. A wrong one is no error yet, for memory may have been written
            to; `SourceFile.verify` then looks.
        memory: what keeps it mapped.
    """

    note: Callable[[int], bool]
    memory: Any


@dataclass(frozen=True)
class SourceFile:
    """One file that was read, as it was when it was opened."""

    path: Path
    fingerprint: Fingerprint
    verify: Callable[[], None] | None = None
    parts: Mapping[Extent, MappedPart] = field(default_factory=dict)


@dataclass
class Sources:
    """Every file read so far; grows when a lazily opened shard is opened."""

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
            fingerprint: as it was before it was read.
            verify: raises `CorruptError` where a checksum fails; reads everything whose checksum nobody has noted.
            parts: what has a checksum and is mapped.
        """
        self.files.append(SourceFile(path, fingerprint, self._through(verify), parts or {}))

    def verify_through(self, call: Callable[[Callable[[], None]], None]) -> None:
        """Let a function call every `verify`, of the files so far and of those to come."""
        self._call = call
        self.files[:] = [replace(source, verify=self._through(source.verify)) for source in self.files]

    def _through(self, verify: Callable[[], None] | None) -> Callable[[], None] | None:
        return verify if verify is None or self._call is None else partial(self._call, verify)

    def parts(self) -> dict[Extent, MappedPart]:
        """Return the mapped parts of all files."""
        return {place: part for source in self.files for place, part in source.parts.items()}

    def verify(self) -> None:
        """Check every checksum of every file that was added since the last call.

        Raises:
            CorruptError: naming the file and the member.
            ChangedError: the same, of a file that is another one by now.
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
            ChangedError: naming the first file that is gone, replaced or written to.
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
                    hint="wait for the trainer to finish saving, then run again",
                )
