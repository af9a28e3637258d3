"""The container of torch's file format: a strict look at the zip archive, before torch sees it.

A ``.pt`` file is a zip archive of stored (never compressed) members: ``<prefix>/data.pkl``, a pickle of the
structure, and ``<prefix>/data/<key>``, one raw storage each. ``torch.load`` trusts such a file: it skips all
checksums by design, and one flag bit makes it return uninitialised memory. So everything is checked here that a
damaged or hostile file could get wrong: names, flags, sizes, overlaps, local headers against the directory,
checksums.

Formats: PKWARE APPNOTE 6.3.10 (zip, zip64); ``torch/serialization.py`` (which members there are). Imports
nothing of torch.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from vraxion_ckpt.checkpoint.source_files import Fingerprint
from vraxion_ckpt.errors import (
    CkptWarning,
    CorruptError,
    LimitError,
    StorageError,
    UnsupportedError,
)
from vraxion_ckpt.wording import count

_MOST_MEMBERS = 200_000
_CRC_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class Member:
    """One stored member: where its bytes lie in the file, and their CRC-32."""

    name: str
    start: int
    size: int
    crc: int


@dataclass(frozen=True)
class Container:
    """A torch zip archive whose structure was checked; checksums of storages were not, see `verify`."""

    path: Path
    fingerprint: Fingerprint
    prefix: str
    members: dict[str, Member]
    _sound: set[str] = field(default_factory=set)

    def storage_size(self, key: str) -> int | None:
        """Return the size in bytes of a storage, or None if the container has none of that key."""
        member = self.members.get(f"{self.prefix}/data/{key}")
        return member.size if member else None

    def storages(self) -> Iterator[Member]:
        """Yield the members that are storages, in the order of their places."""
        return (member for name, member in self.members.items() if name.startswith(f"{self.prefix}/data/"))

    def note(self, name: str, crc: int) -> bool:
        """Take the CRC-32 of a member's bytes from someone who has read them; if it is the stated one, return True.

        `verify` then need not read them.
        """
        if crc and crc == self.members[name].crc:
            self._sound.add(name)
            return True
        return False

    def verify(self) -> None:
        """Compare the CRC-32 of every member with its bytes.

        Raises:
            CorruptError: naming the member.
        """
        with mapped(self.path) as data:
            self.verify_members(data, (m for name, m in self.members.items() if name not in self._sound))

    def verify_members(self, data: memoryview, members: Iterable[Member]) -> None:
        """Compare the CRC-32 of some members with their bytes in `data`, the whole file."""
        unchecked, damaged = 0, []
        for member in members:
            if member.crc == 0 and member.size:
                unchecked += 1
                continue
            crc = 0
            for at in range(member.start, member.start + member.size, _CRC_CHUNK):
                crc = zlib.crc32(data[at : min(at + _CRC_CHUNK, member.start + member.size)], crc)
            if crc != member.crc:
                damaged.append(member.name)
        if damaged:
            others = f"; nor do those of {', '.join(damaged[1:])}" if damaged[1:] else ""
            raise CorruptError(f"its checksum does not match its bytes{others}", path=self.path, key=damaged[0])
        if unchecked:
            message = f"{self.path}: {count(unchecked, 'member')} without a checksum; damage there cannot be seen"
            warnings.warn(message, CkptWarning, stacklevel=2)


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """Map a file read-only for the length of a ``with`` block.

    Raises:
        CorruptError: it is empty.
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    except ValueError:
        raise CorruptError("is empty", path=path) from None
    with memoryview(mapping) as view:
        yield view


_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_HAS_DESCRIPTOR, _UTF8 = 0x0008, 0x0800


def check_archive(path: Path) -> Container:
    """Look strictly at the container of a ``.pt`` file, before torch does; verify everything but the storages.

    Raises:
        CorruptError: not a torch archive, or one with contradicting, overlapping, duplicate or damaged members.
        UnsupportedError: an older torch format, or TorchScript.
        LimitError: compressed members that would inflate beyond the file, or too many members.
        StorageError: the file cannot be read.
    """
    if not path.is_file():
        raise CorruptError("is not a regular file", path=path)
    try:
        fingerprint = Fingerprint.of(path)
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    with mapped(path) as data:
        _refuse_other_kinds(path, bytes(data[:512]))
        members = _Directory(path, data).members()
        prefix = _check_names(path, members)
        container = Container(path, fingerprint, prefix, {member.name: member for member in members})
        storages = f"{prefix}/data/"
        container.verify_members(data, [m for m in members if not m.name.startswith(storages)])
        byteorder = container.members.get(f"{prefix}/byteorder")
        if byteorder and bytes(data[byteorder.start : byteorder.start + byteorder.size]) != b"little":
            raise UnsupportedError("was saved on a big-endian machine", path=path)
    return container


def fill_in_checksums(path: Path, known: Mapping[tuple[int, int], int]) -> None:
    """Put the CRC-32 of every member where an archive that was written without them has none.

    Args:
        path: an archive that nobody else has seen yet.
        known: the CRC-32 of members, by where their bytes start and how many they are; the others are read.
    """
    patches: list[tuple[int, int]] = []
    with mapped(path) as data:
        directory = _Directory(path, data)
        for at, offset, member in directory.entries(*directory.end_of_directory()):
            end = member.start + member.size
            crc = known.get((member.start, member.size))
            if crc is None:
                crc = zlib.crc32(data[member.start : end])
            (flags,) = struct.unpack_from("<H", data, at + 8)
            if flags & _HAS_DESCRIPTOR:
                beside = end + 4 if bytes(data[end : end + 4]) == b"PK\x07\x08" else end
            else:
                beside = offset + 14
            patches += [(beside, crc), (at + 16, crc)]
    with path.open("r+b") as file:
        for place, crc in patches:
            file.seek(place)
            file.write(struct.pack("<I", crc))


def is_archive(path: Path) -> bool:
    """Tell whether a regular file begins as torch's archives do: a zip whose first member is the pickle."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(30)
            name = file.read(int.from_bytes(head[26:28], "little"))
    except OSError:
        return False
    return head.startswith(b"PK\x03\x04") and name.endswith(b"/data.pkl")


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    if head.startswith(b"PK\x03\x04"):
        return
    resave = "load it with the torch that wrote it and save it again with torch.save"
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):
        raise UnsupportedError("is in torch's format from before 1.6", path=path, hint=resave)
    if head[257:262] == b"ustar":
        raise UnsupportedError("is in torch's oldest format, a tar archive", path=path, hint=resave)
    if head.startswith(b"version https://git-lfs"):
        raise CorruptError("is a git-lfs pointer, not the file itself", path=path, hint="run `git lfs pull`")
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html")):
        raise CorruptError("is a web page, not a checkpoint", path=path, hint="download the file itself")
    if head.startswith(b"\x80"):
        raise UnsupportedError("is a bare pickle, not a file of torch.save", path=path, hint=resave)
    raise CorruptError("is not a torch archive", path=path)


class _Directory:
    """A strict parser of a zip file's central directory and local headers."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self._path = path
        self._data = data
        self._compressed: list[str] = []

    def members(self) -> list[Member]:
        count, start, end = self.end_of_directory()
        if count > _MOST_MEMBERS:
            raise LimitError(f"has {count} members, more than {_MOST_MEMBERS}", path=self._path)
        found: list[tuple[int, Member]] = []
        seen = set()
        for _, offset, member in self.entries(count, start, end):
            # torch finds members without regard to case.
            if member.name.lower() in seen:
                self._corrupt("occurs twice", member.name)
            seen.add(member.name.lower())
            found.append((offset, member))
        if self._compressed:  # only now, for a bomb may stand behind a harmless member
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

    def entries(self, count: int, start: int, end: int) -> Iterator[tuple[int, int, Member]]:
        """Yield where each entry of the directory stands, where its local header does, and the member."""
        at = start
        for _ in range(count):
            after, offset, member = self._central_entry(at, end, start)
            yield at, offset, member
            at = after
        if at != end:
            self._corrupt("the directory's size does not match its entries")

    def end_of_directory(self) -> tuple[int, int, int]:
        """Return the number of entries, and where the directory starts and ends."""
        size = len(self._data)
        if size < _END.size or bytes(self._data[size - _END.size :][:4]) != b"PK\x05\x06":
            self._corrupt("is truncated, or has something after its end")
        at = size - _END.size
        _, disk, directory_disk, here, count, length, start, comment = self._unpack(_END, at)
        if disk or directory_disk or here != count or comment:
            self._corrupt("its end record is damaged")
        locator = at - _END64_LOCATOR.size
        if locator >= 0 and bytes(self._data[locator : locator + 4]) == b"PK\x06\x07":
            _, locator_disk, at64, disks = self._unpack(_END64_LOCATOR, locator)
            if locator_disk or disks > 1 or at64 + _END64.size != locator:
                self._corrupt("its zip64 locator is damaged")
            signature, length64, _, _, d1, d2, here64, count64, size64, start64 = self._unpack(_END64, at64)
            short = ((count, count64, 0xFFFF), (length, size64, 0xFFFFFFFF), (start, start64, 0xFFFFFFFF))
            agree = all(value in (full, limit) for value, full, limit in short)
            if signature != b"PK\x06\x06" or length64 != 44 or d1 or d2 or here64 != count64 or not agree:
                self._corrupt("its zip64 end record is damaged")
            at, count, length, start = at64, count64, size64, start64
        if start + length != at:
            self._corrupt("its directory is not where its end record says")
        return count, start, at

    def _central_entry(self, at: int, end: int, directory: int) -> tuple[int, int, Member]:
        if at + _CENTRAL.size > end:
            self._corrupt("the directory's size does not match its entries")
        fields = self._unpack(_CENTRAL, at)
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
        ) = fields
        name_at = at + _CENTRAL.size
        after = name_at + n_name + n_extra + n_comment
        if signature != b"PK\x01\x02" or after > end:
            self._corrupt("a directory entry is damaged")
        raw_name = bytes(self._data[name_at : name_at + n_name])
        name = self._decode(raw_name)
        extra = bytes(self._data[name_at + n_name : name_at + n_name + n_extra])
        size, packed, offset = self._zip64(extra, size, packed, offset, name)
        if method:
            if size > len(self._data):
                raise LimitError("is compressed and would inflate beyond the file", path=self._path, key=name)
            self._compressed.append(name)
            return after, offset, Member(name, offset, 0, crc)
        if flags & ~(_HAS_DESCRIPTOR | _UTF8) or packed != size or disk:
            self._corrupt("is encrypted, or its header is damaged", name)
        if name.endswith("/") or attributes & 0x10:
            self._corrupt("is marked as a directory", name)
        if offset + _LOCAL.size > directory:
            self._corrupt("lies beyond the directory", name)
        start = self._check_local(offset, raw_name, flags, crc, size, name)
        if start + size > directory:
            self._corrupt("reaches into the directory", name)
        return after, offset, Member(name, start, size, crc)

    def _zip64(self, extra: bytes, size: int, packed: int, offset: int, name: str) -> tuple[int, int, int]:
        """Take the sizes and the offset that do not fit 32 bits from the zip64 extra field."""
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
        """Compare a local header with its directory entry; return where the member's bytes start."""
        fields = self._unpack(_LOCAL, offset)
        signature, _, local_flags, method, _, _, local_crc, packed, full, n_name, n_extra = fields
        name_at = offset + _LOCAL.size
        if signature != b"PK\x03\x04" or bytes(self._data[name_at : name_at + n_name]) != raw_name:
            self._corrupt("its local header names another member", name)
        if method or local_flags != flags:
            self._corrupt("its local header contradicts the directory", name)
        if not flags & _HAS_DESCRIPTOR:
            told = {size, 0xFFFFFFFF} if size >= 0xFFFFFFFF else {size}
            if local_crc != crc or packed not in told or full not in told:
                self._corrupt("its local header contradicts the directory", name)
        return int(name_at + n_name + n_extra)

    def _unpack(self, record: struct.Struct, at: int) -> tuple[Any, ...]:
        if at < 0 or at + record.size > len(self._data):
            self._corrupt("is truncated")
        return record.unpack_from(self._data, at)

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


def _check_names(path: Path, members: Sequence[Member]) -> str:
    """Return the archive's prefix; every torch archive has one, and one ``data.pkl`` under it."""
    pickles = [member.name for member in members if member.name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") != 1:
        raise CorruptError(f"has {len(pickles)} members called data.pkl, not one", path=path)
    prefix = pickles[0].removesuffix("/data.pkl")
    for member in members:
        if not member.name.startswith(f"{prefix}/"):
            raise CorruptError(f"lies outside {prefix}/", path=path, key=member.name)
        if member.name.startswith((f"{prefix}/code/", f"{prefix}/constants.pkl")):
            raise UnsupportedError(
                "is a TorchScript archive", path=path, hint="save the module's state_dict() with torch.save"
            )
    return prefix
