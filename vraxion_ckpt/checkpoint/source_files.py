"""The files from which a checkpoint was read, and the bytes in them that tensors refer to.

Opening a checkpoint reads names, shapes and small values only. So readers register every file here. Before a result is
committed, the files must be unchanged, and every checksum that they state must be right. Imports without torch.
"""

from __future__ import annotations

import ctypes
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from vraxion_ckpt.errors import (
    ChangedError,
    CkptWarning,
    CorruptError,
    OutOfMemoryError,
    StorageError,
    raise_if_out_of_memory,
)
from vraxion_ckpt.support.checksums import checksums_of_ranges, crc32
from vraxion_ckpt.support.file_bytes import read_at, read_into
from vraxion_ckpt.wording import count, listed

if TYPE_CHECKING:
    import torch

_PIECE = 2**20  # bytes that are read at a time
_MOST_OPEN = 128  # files that are kept open, because processes may open only some hundreds


@dataclass(frozen=True)
class Fingerprint:
    """The file attributes that change when a file is written or replaced."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Fingerprint:
        """Return the fingerprint of a file, given by its path or by a file descriptor."""
        status = os.stat(file)  # noqa: PTH116 - it may be a descriptor
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(eq=False, slots=True, weakref_slot=True)
class StoredBytes:
    """A run of bytes in a source file. Tensors with the same `StoredBytes` object share memory when they are loaded.

    Attributes:
        file: the file.
        start: offset of the first byte.
        nbytes: number of bytes.
        crc: the CRC-32 that the file states, or None if it states none.
        name: the name of the bytes in the file, for messages.
        alignment: the memory that plugins get begins at a multiple of this number of bytes.
        is_copy: whether the memory that plugins get is a copy, so that it shares no memory with other `StoredBytes`.
        proven: whether the bytes were read and have the stated CRC-32.
        found_crc: the CRC-32 of the bytes, computed when they were copied, or None. Only if the file states none.
        given: the mapped memory that plugins got, or None if no plugin has looked at the bytes. Its owner may have
            changed it, so from then on it has the values, not the file.
        noted: the CRC-32 of `given` when a plugin handed it over, or None.
    """

    file: SourceFile
    start: int
    nbytes: int
    crc: int | None = None
    name: str = ""
    alignment: int = 1
    is_copy: bool = False
    proven: bool = False
    found_crc: int | None = None
    given: torch.UntypedStorage | None = None
    noted: int | None = None

    @property
    def known_crc(self) -> int | None:
        """The CRC-32 of the bytes: the noted one, or the stated one, or the one that a copy found; None if none."""
        return next((crc for crc in (self.noted, self.crc, self.found_crc) if crc is not None), None)

    def memory(self) -> torch.UntypedStorage:
        """Return the bytes as memory that plugins may get. A write into it does not reach the file."""
        if self.given is None:
            given: Any = self.file.memory(self.start, self.nbytes, "core" if self.is_copy else "plugins")
            self.given = given.clone() if self.is_copy or self.start % self.alignment else given
        return self.given

    def view(self) -> torch.UntypedStorage:
        """Return the bytes as memory for reading."""
        if self.given is not None:
            return self.given
        memory: Any = self.file.memory(self.start, self.nbytes, "core")
        return memory.clone() if self.start % self.alignment else memory  # type: ignore[no-any-return]

    def unshared(self) -> torch.UntypedStorage:
        """Return the bytes as memory of a new mapping. A write into it reaches nobody else."""
        if self.given is not None:
            return self.given.clone()  # type: ignore[no-any-return,no-untyped-call]
        return self.file.memory(self.start, self.nbytes, None)

    def note(self) -> None:
        """Note the CRC-32 of the memory that a plugin got and hands over."""
        if self.given is not None and self.noted is None:
            self.noted = crc32(buffer_of(self.given))

    def was_written_into(self) -> bool:
        """Return whether the memory has changed since `note`, or if it was not noted, whether it differs from the file.

        Raises the errors of `differs_from_file`.
        """
        if self.noted is not None and self.given is not None:
            return crc32(buffer_of(self.given)) != self.noted
        return self.differs_from_file()

    def differs_from_file(self) -> bool:
        """Return whether the memory that plugins got differs from the file. Reads all bytes if a plugin got them.

        Raises:
            ChangedError: the file was replaced, written to or removed since it was registered.
            StorageError: the operating system cannot read it.
        """
        if self.given is None:
            return False
        memory = buffer_of(self.given)
        if self.crc is not None and crc32(memory) == self.crc:
            return False
        return any(memory[first : first + len(piece)] != piece for first, piece in self.pieces())

    def read(self, first: int, size: int) -> bytes:
        """Read `size` bytes, beginning with byte number `first`.

        Raises:
            ChangedError: the file was replaced, written to or removed since it was registered.
            StorageError: the operating system cannot read it.
        """
        if self.given is not None:
            return buffer_of(self.given)[first : first + size].tobytes()
        return self.file.read(self.start + first, size)

    def read_into(self, first: int, buffer: memoryview) -> None:
        """Fill a buffer with bytes, beginning with byte number `first`. Raises the errors of `read`."""
        if self.given is not None:
            buffer[:] = buffer_of(self.given)[first : first + len(buffer)]
            return
        with self.file.opened() as descriptor:
            read_into(descriptor, self.start + first, buffer, self.file.path)

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """Yield the offset of each piece of the file, and its bytes. Raises the errors of `read`."""
        with self.file.opened() as descriptor:
            for first in range(0, self.nbytes, _PIECE):
                size = min(_PIECE, self.nbytes - first)
                yield first, read_at(descriptor, self.start + first, size, self.file.path)

    def copied(self) -> StoredBytes:
        """Return equal bytes that share no memory with these when they are loaded."""
        return StoredBytes(self.file, self.start, self.nbytes, self.crc, self.name, self.alignment, is_copy=True)

    def __deepcopy__(self, memo: object) -> StoredBytes:
        return self.copied()

    def __reduce__(self) -> tuple[Any, ...]:  # without the mapped memory
        return StoredBytes, (self.file, self.start, self.nbytes, self.crc, self.name, self.alignment, self.is_copy)


@dataclass(eq=False)
class SourceFile:
    """One file that was read.

    Attributes:
        path: the file.
        fingerprint: its fingerprint from before it was read.
        parts: the runs of bytes whose checksums the file states or could state.
        states_checksums: whether the format has checksums. If so, parts without one are reported.
    """

    path: Path
    fingerprint: Fingerprint
    parts: Sequence[StoredBytes] = ()
    states_checksums: bool = False
    _kept: _Descriptor | None = field(default=None, init=False, repr=False)
    _mappings: dict[str | None, torch.UntypedStorage] = field(default_factory=dict, init=False, repr=False)

    def read(self, start: int, size: int) -> bytes:
        """Read bytes from the file. See `StoredBytes.read`."""
        with self.opened() as descriptor:
            return read_at(descriptor, start, size, self.path)

    def memory(self, start: int, size: int, user: Literal["core", "plugins"] | None) -> torch.UntypedStorage:
        """Return bytes of the file as memory: mapped, or read if the address space has no room for the whole file.

        A write into it reaches neither the file nor the memory of another user. Without a user, it reaches nobody.
        Raises the errors of `opened`.
        """
        mapped: Any = self._mappings.get(user)
        if mapped is None:
            try:
                mapped = self._map()
            except OutOfMemoryError:
                return self._load(start, size)
            if user is not None:
                self._mappings[user] = mapped
        return mapped[start : start + size]  # type: ignore[no-any-return]  # torch declares any kind of storage

    def _map(self) -> torch.UntypedStorage:
        import torch

        try:
            with self.opened() as descriptor:
                name = f"/proc/self/fd/{descriptor}"  # the file itself, even if another one has its path now
                mapped: Any = torch.UntypedStorage.from_file(name, False, self.fingerprint.size)
        except RuntimeError as error:
            raise_if_out_of_memory(error, self.path)
            raise StorageError(f"cannot be mapped into memory: {error}", path=self.path) from error
        return mapped  # type: ignore[no-any-return]  # torch declares any kind of storage

    def _load(self, start: int, size: int) -> torch.UntypedStorage:
        import torch

        loaded = torch.empty(size, dtype=torch.uint8).untyped_storage()
        with self.opened() as descriptor:
            read_into(descriptor, start, buffer_of(loaded), self.path)
        return loaded

    def keep_open(self) -> None:
        """Open the file, so that its bytes stay readable when another file takes its path.

        Only the last `_MOST_OPEN` files are kept open. Raises the errors of `opened`.
        """
        if self._kept is None:
            with self.opened() as descriptor:
                self._kept = _kept_open[id(self)] = _Descriptor(os.dup(descriptor))
            weakref.finalize(self, _kept_open.pop, id(self), None)
            while len(_kept_open) > _MOST_OPEN:
                _kept_open.pop(next(iter(_kept_open))).close()

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Give a descriptor of the file, as it was when it was registered, during a ``with`` block.

        Raises:
            ChangedError: the file was replaced, written to or removed.
            StorageError: the operating system cannot open it.
        """
        descriptor = self._kept.duplicate() if self._kept is not None else None
        if descriptor is None:
            descriptor = self._open()
        try:
            if Fingerprint.of(descriptor) != self.fingerprint:
                raise self.changed()
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self.changed() from None
        except OSError as error:
            raise StorageError.from_os_error(error, self.path) from error

    def check_unchanged(self) -> None:
        """Compare the file with its fingerprint.

        Raises:
            ChangedError: it is gone, replaced or written to.
        """
        try:
            now = Fingerprint.of(self.path)
        except OSError:
            now = None
        if now != self.fingerprint:
            raise self.changed()

    def __deepcopy__(self, memo: object) -> SourceFile:
        return self  # a copy would close the descriptor of this one

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"_kept": None, "_mappings": {}}

    def changed(self) -> ChangedError:
        """Return the error for a file that has changed."""
        return ChangedError(
            "changed while it was being read",
            path=self.path,
            written=(),
            hint="wait until the trainer has finished saving, then run again",
        )

    def verify(self) -> None:
        """Compare the checksum of each part that is not proven with its bytes.

        Raises:
            CorruptError: a checksum does not match; the key is the name of the part.
            ChangedError: the file has changed.
        """
        stated = [part for part in self.parts if part.crc is not None and not part.proven]
        damaged = []
        with self.opened() as descriptor:
            found = checksums_of_ranges(descriptor, [(part.start, part.nbytes) for part in stated], self.path)
        for part, crc in zip(stated, found, strict=True):
            part.proven = crc == part.crc
            if not part.proven:
                damaged.append(part.name)
        if damaged:
            self.check_unchanged()
            others = f"; the same holds for {listed(damaged[1:])}" if damaged[1:] else ""
            raise CorruptError(f"its checksum does not match its bytes{others}", path=self.path, key=damaged[0])
        without = sum(part.crc is None and part.nbytes > 0 for part in self.parts) if self.states_checksums else 0
        if without:
            some = f"{count(without, 'member')} without a checksum"
            message = f"{self.path}: has {some}, so damage to these bytes cannot be detected"
            warnings.warn(message, CkptWarning, stacklevel=2)


def buffer_of(storage: torch.UntypedStorage) -> memoryview:
    """Return the memory of a storage as bytes, without a copy. They keep the storage alive."""
    size = storage.nbytes()
    if not size:
        return memoryview(b"")
    memory: Any = (ctypes.c_ubyte * size).from_address(storage.data_ptr())
    memory.owner = storage
    return memoryview(memory).cast("B")


class _Descriptor:
    """An open file descriptor. It is closed by `close`, or when nothing refers to it."""

    def __init__(self, number: int) -> None:
        self._number: int | None = number
        self._lock = Lock()

    def duplicate(self) -> int | None:
        """Return a descriptor that the caller closes, or None. Another thread may close this one at any time."""
        with self._lock:
            return None if self._number is None else os.dup(self._number)

    def close(self) -> None:
        with self._lock:
            number, self._number = self._number, None
        if number is not None:
            os.close(number)

    __del__ = close


_kept_open: dict[int, _Descriptor] = {}  # by the id of the `SourceFile`, oldest first


@dataclass
class Sources:
    """All files read so far. Grows when a closed expert opens its shard."""

    files: list[SourceFile] = field(default_factory=list)
    _verified: int = field(default=0, init=False)
    _by_path: dict[Path, list[SourceFile]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _indexed: int = field(default=0, init=False, repr=False, compare=False)  # number of files in `_by_path`

    def __iter__(self) -> Iterator[SourceFile]:
        return iter(self.files)

    def add(self, path: Path, fingerprint: Fingerprint) -> SourceFile:
        """Register a file with its fingerprint from before it is read, and return it."""
        self.files.append(SourceFile(path, fingerprint))
        self.files[-1].keep_open()
        return self.files[-1]

    def at(self, path: Path) -> Sequence[SourceFile]:
        """Return the files that were read from a path. There may be thousands of other files."""
        for source in self.files[self._indexed :]:
            self._by_path.setdefault(source.path, []).append(source)
        self._indexed = len(self.files)
        return self._by_path.get(path, ())

    def verify(self) -> None:
        """Verify the checksums of every file that was added since the last call.

        Raises:
            CorruptError: a checksum is wrong. The error names the file and the part.
            ChangedError: a checksum is wrong, and a file has changed since it was opened.
        """
        while self._verified < len(self.files):
            try:
                self.files[self._verified].verify()
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
            source.check_unchanged()
