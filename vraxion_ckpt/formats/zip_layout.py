"""Lay out a zip archive of uncompressed members as torch writes it.

Bytes of members begin at multiples of 64. Checksums follow the bytes, in data descriptors, so that nothing before them
depends on them. Formats: PKWARE APPNOTE 6.3.10 (zip and zip64), and ``caffe2/serialize/inline_container.cc`` in
https://github.com/pytorch/pytorch for the padding. Imports without torch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vraxion_ckpt.formats.zip_records import (
    CENTRAL_HEADER,
    END,
    END64,
    END64_LOCATOR,
    HAS_DESCRIPTOR,
    LOCAL_HEADER,
    UTF8_NAME,
)
from vraxion_ckpt.support.file_copy import BLOCK

_MOST_32, _MOST_16 = 0xFFFFFFFF, 0xFFFF
_NEEDS_64 = 0xFFFFFFFF  # numbers from here on are in zip64 fields
ALIGNMENT = 64
_DESCRIPTOR, _DESCRIPTOR64 = struct.Struct("<4sI2I"), struct.Struct("<4sI2Q")


class NewMember(NamedTuple):
    """A member of an archive that is to be written.

    Attributes:
        name: its name.
        size: number of bytes.
        header_start: offset of its local header.
        start: offset of its bytes.
    """

    name: bytes
    size: int
    header_start: int
    start: int

    @property
    def is_zip64(self) -> bool:
        """Whether its size or its offset needs more than 32 bits."""
        return self.size >= _NEEDS_64 or self.header_start >= _NEEDS_64

    @property
    def end(self) -> int:
        """Offset of the byte after its data descriptor."""
        return self.start + self.size + (self._descriptor_format.size if self.size else 0)

    def header(self) -> bytes:
        """Return the local header, padded with an extra field so that the bytes are aligned."""
        extra = _zip64_field(self.size, self.header_start)
        padding = self.start - self.header_start - LOCAL_HEADER.size - len(self.name) - len(extra) - 4
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        fixed = (b"PK\x03\x04", 0, self._flags, 0, 0, 0, 0, 0, 0, len(self.name), len(extra))
        return LOCAL_HEADER.pack(*fixed) + self.name + extra

    def descriptor(self, crc: int) -> bytes:
        """Return what follows the bytes: their CRC-32 and their number. An empty member has none."""
        if not self.size:
            return b""
        return self._descriptor_format.pack(b"PK\x07\x08", crc, self.size, self.size)

    @property
    def _descriptor_format(self) -> struct.Struct:
        return _DESCRIPTOR64 if self.is_zip64 else _DESCRIPTOR

    def directory_entry(self, crc: int) -> bytes:
        """Return the entry in the central directory."""
        extra = _zip64_field(self.size, self.header_start)
        size, offset = (_MOST_32 if number >= _NEEDS_64 else number for number in (self.size, self.header_start))
        lengths = (len(self.name), len(extra), 0, 0, 0, 0)
        fixed = (b"PK\x01\x02", 0, 0, self._flags, 0, 0, 0, crc, size, size, *lengths, offset)
        return CENTRAL_HEADER.pack(*fixed) + self.name + extra

    @property
    def _flags(self) -> int:
        return UTF8_NAME | (HAS_DESCRIPTOR if self.size else 0)


def _zip64_field(size: int, offset: int) -> bytes:
    """Return the extra field for what needs more than 32 bits; empty if nothing does."""
    if size < _NEEDS_64 and offset < _NEEDS_64:
        return b""
    values = [*([size, size] if size >= _NEEDS_64 else []), *([offset] if offset >= _NEEDS_64 else [])]
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)


def lay_out(members: Iterable[tuple[str, int, int | None]]) -> list[NewMember]:
    """Return where members go, in order.

    Args:
        members: name, number of bytes, and for bytes that may share blocks with a source file their offset there, else
            None. They get an offset that is the same within a block, if it is a multiple of 64.
    """
    placed: list[NewMember] = []
    at = 0
    for name, size, offset_in_source in members:
        encoded = name.encode()
        unaligned = at + LOCAL_HEADER.size + len(encoded) + len(_zip64_field(size, at)) + 4
        start = -(-unaligned // ALIGNMENT) * ALIGNMENT
        if offset_in_source is not None and offset_in_source % ALIGNMENT == 0:
            start += (offset_in_source - start) % BLOCK
        placed.append(NewMember(encoded, size, at, start))
        at = placed[-1].end
    return placed


def directory_size(members: Sequence[NewMember]) -> int:
    """Return the number of bytes that `directory` returns."""
    fixed = CENTRAL_HEADER.size * len(members) + END64.size + END64_LOCATOR.size + END.size
    return fixed + sum(len(each.name) + len(_zip64_field(each.size, each.header_start)) for each in members)


def directory(members: Sequence[NewMember], crcs: Sequence[int]) -> bytes:
    """Return the central directory and the end records, which follow the last member."""
    start = members[-1].end
    entries = b"".join(member.directory_entry(crc) for member, crc in zip(members, crcs, strict=True))
    count, size = len(members), len(entries)
    end64 = END64.pack(b"PK\x06\x06", END64.size - 12, 0x031E, 45, 0, 0, count, count, size, start)
    locator = END64_LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
    short_count = min(count, _MOST_16)
    short = (short_count, short_count, min(size, _MOST_32), min(start, _MOST_32))
    return entries + end64 + locator + END.pack(b"PK\x05\x06", 0, 0, *short, 0)
