"""Read the directory of a zip archive strictly.

Format: PKWARE APPNOTE 6.3.10 (zip and zip64). Imports without torch.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

from vraxion_ckpt.errors import CorruptError, LimitError, StorageError, UnsupportedError, is_out_of_memory
from vraxion_ckpt.formats.zip_records import (
    CENTRAL_HEADER,
    END,
    END64,
    END64_LOCATOR,
    HAS_DESCRIPTOR,
    LOCAL_HEADER,
    UTF8_NAME,
)
from vraxion_ckpt.support.file_bytes import read_at

_MOST_MEMBERS = 200_000


class Member(NamedTuple):
    """An uncompressed member of an archive: the offset of its bytes in the file, their number, and their CRC-32."""

    name: str
    start: int
    size: int
    crc: int


class FileBytes(Protocol):
    """The bytes of a file, read by slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice) -> bytes | memoryview: ...


class _ReadBytes:
    """The bytes of an open file, each slice read when it is asked for."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path
        self._size = os.fstat(descriptor).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice) -> bytes:
        start, stop, _ = where.indices(self._size)
        return read_at(self._descriptor, start, max(0, stop - start), self._path)


@contextlib.contextmanager
def opened_bytes(path: Path) -> Iterator[FileBytes]:
    """Give the bytes of a file during a ``with`` block.

    It is memory-mapped, because that is fastest, or else read if the address space has no room for it.

    Raises:
        CorruptError: the file is empty.
        StorageError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            try:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                if not is_out_of_memory(error):
                    raise
                yield _ReadBytes(file.fileno(), path)
                return
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    except ValueError:
        raise CorruptError("is empty", path=path) from None
    with memoryview(mapping) as view:
        yield view


class ZipDirectory:
    """A strict parser of a zip file's central directory and local headers."""

    def __init__(self, path: Path, data: FileBytes) -> None:
        self._path = path
        self._data = data
        self._compressed: list[str] = []

    def members(self) -> list[Member]:
        """Return the members in the order of their bytes.

        Raises:
            CorruptError: headers contradict each other, or members overlap or occur twice.
            UnsupportedError: a member is compressed.
            LimitError: there are too many members, or a compressed one is larger than the file.
        """
        count, start, end = self._end_of_directory()
        if count > _MOST_MEMBERS:
            raise LimitError(f"has {count} members; at most {_MOST_MEMBERS} are supported", path=self._path)
        found = list(self._entries(count, start, end))
        self._refuse_duplicates([member.name for _, member in found])
        if self._compressed:  # after the loop, which finds zip bombs behind harmless members
            hint = "save the file again with torch.save"
            raise UnsupportedError("is compressed", path=self._path, key=self._compressed[0], hint=hint)
        found.sort(key=lambda pair: pair[0])
        reached = 0
        for offset, member in found:
            if offset < reached:
                self._corrupt("overlaps the member before it", member.name)
            reached = member.start + member.size
        if reached > start:
            self._corrupt("the last member overlaps the directory")
        return [member for _, member in found]

    def _refuse_duplicates(self, names: list[str]) -> None:
        # torch ignores case when it looks up a member.
        if len({name.lower() for name in names}) < len(names):
            seen: set[str] = set()
            for name in names:
                if name.lower() in seen:
                    self._corrupt("occurs twice", name)
                seen.add(name.lower())

    def _entries(self, count: int, start: int, end: int) -> Iterator[tuple[int, Member]]:
        """Yield the offset of each member's local header, and the member."""
        directory = bytes(self._data[start:end])
        at = 0
        for _ in range(count):
            if at + CENTRAL_HEADER.size > len(directory):
                self._corrupt("the directory's size does not match its entries")
            after, offset, member = self._central_entry(directory, at, start)
            yield offset, member
            at = after
        if at != len(directory):
            self._corrupt("the directory's size does not match its entries")

    def _end_of_directory(self) -> tuple[int, int, int]:
        """Return the number of entries, and the offsets at which the directory starts and ends."""
        size = len(self._data)
        if size < END.size or bytes(self._data[size - END.size :][:4]) != b"PK\x05\x06":
            self._corrupt("is truncated, or has bytes after its end")
        at = size - END.size
        _, disk, directory_disk, here, count, length, start, comment = self._unpack(END, at)
        if disk or directory_disk or here != count or comment:
            self._corrupt("its end record is damaged")
        locator = at - END64_LOCATOR.size
        if locator >= 0 and bytes(self._data[locator : locator + 4]) == b"PK\x06\x07":
            _, locator_disk, at64, disks = self._unpack(END64_LOCATOR, locator)
            if locator_disk or disks > 1 or at64 + END64.size != locator:
                self._corrupt("its zip64 locator is damaged")
            signature, length64, _, _, d1, d2, here64, count64, size64, start64 = self._unpack(END64, at64)
            short = ((count, count64, 0xFFFF), (length, size64, 0xFFFFFFFF), (start, start64, 0xFFFFFFFF))
            agree = all(value in (full, limit) for value, full, limit in short)
            if signature != b"PK\x06\x06" or length64 != 44 or d1 or d2 or here64 != count64 or not agree:
                self._corrupt("its zip64 end record is damaged")
            at, count, length, start = at64, count64, size64, start64
        if start + length != at:
            self._corrupt("its directory is not where its end record says")
        return count, start, at

    def _central_entry(self, directory: bytes, at: int, start: int) -> tuple[int, int, Member]:
        """Read the entry at offset `at` of the directory, which is at offset `start` of the file."""
        (
            signature,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            n_name,
            n_extra,
            n_comment,
            disk,
            _,
            attributes,
            offset,
        ) = CENTRAL_HEADER.unpack_from(directory, at)
        name_at = at + CENTRAL_HEADER.size
        extra_at = name_at + n_name
        after = extra_at + n_extra + n_comment
        if signature != b"PK\x01\x02" or after > len(directory):
            self._corrupt("a directory entry is damaged")
        raw_name = directory[name_at:extra_at]
        name = self._decode(raw_name)
        if 0xFFFFFFFF in (size, packed, offset):
            size, packed, offset = self._zip64(directory[extra_at : extra_at + n_extra], size, packed, offset, name)
        if method:
            if size > len(self._data):
                raise LimitError("is compressed and would inflate beyond the file", path=self._path, key=name)
            self._compressed.append(name)
            return after, offset, Member(name, offset, 0, crc)
        if flags & ~(HAS_DESCRIPTOR | UTF8_NAME) or packed != size or disk:
            self._corrupt("is encrypted, or its header is damaged", name)
        if name.endswith("/") or attributes & 0x10:
            self._corrupt("is marked as a directory", name)
        if offset + LOCAL_HEADER.size > start:
            self._corrupt("lies beyond the directory", name)
        begin = self._check_local(offset, raw_name, flags, crc, size, name)
        if begin + size > start:
            self._corrupt("reaches into the directory", name)
        return after, offset, Member(name, begin, size, crc)

    def _zip64(self, extra: bytes, size: int, packed: int, offset: int, name: str) -> tuple[int, int, int]:
        """Return the sizes and the offset, read from the zip64 extra field if they do not fit 32 bits."""
        values = {"size": size, "packed": packed, "offset": offset}
        wanted = [key for key, value in values.items() if value == 0xFFFFFFFF]
        at = 0
        while wanted and at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            if kind == 1 and length >= 8 * len(wanted) and at + 4 + length <= len(extra):
                for i, key in enumerate(wanted):
                    (values[key],) = struct.unpack_from("<Q", extra, at + 4 + 8 * i)
                wanted = []
            at += 4 + length
        if wanted:
            self._corrupt("its zip64 sizes are missing", name)
        return values["size"], values["packed"], values["offset"]

    def _check_local(self, offset: int, raw_name: bytes, flags: int, crc: int, size: int, name: str) -> int:
        """Compare a local header with its directory entry, and return the offset of the member's bytes."""
        # `_central_entry` has checked that the file has so many bytes.
        header = LOCAL_HEADER.unpack(self._data[offset : offset + LOCAL_HEADER.size])
        signature, _, local_flags, method, _, _, local_crc, packed, full, n_name, n_extra = header
        name_at = offset + LOCAL_HEADER.size
        if signature != b"PK\x03\x04" or self._data[name_at : name_at + n_name] != raw_name:
            self._corrupt("its local header names another member", name)
        if method or local_flags != flags:
            self._corrupt("its local header contradicts the directory", name)
        if not flags & HAS_DESCRIPTOR:
            allowed = (size, 0xFFFFFFFF) if size >= 0xFFFFFFFF else (size,)
            if local_crc != crc or packed not in allowed or full not in allowed:
                self._corrupt("its local header contradicts the directory", name)
        return int(name_at + n_name + n_extra)

    def _unpack(self, record: struct.Struct, at: int) -> tuple[Any, ...]:
        if at < 0 or at + record.size > len(self._data):
            self._corrupt("is truncated")
        return record.unpack(self._data[at : at + record.size])

    def _decode(self, raw: bytes) -> str:
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            name = ""
        if not name or "\0" in name:
            self._corrupt("a member's name is damaged")
        return name

    def _corrupt(self, message: str, member: str | None = None) -> NoReturn:
        raise CorruptError(message, path=self._path, key=member)
