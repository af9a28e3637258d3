"""Read and write bytes at an offset of an open file. Imports without torch."""

from __future__ import annotations

import os
from pathlib import Path

from vraxion_ckpt.errors import CorruptError, StorageError


def read_at(descriptor: int, start: int, size: int, path: Path) -> bytes:
    """Read exactly `size` bytes at an offset.

    Raises:
        CorruptError: the file ends before.
        StorageError: the operating system cannot read.
    """
    found = b""
    try:
        while len(found) < size:
            more = os.pread(descriptor, size - len(found), start + len(found))
            if not more:
                raise CorruptError("is truncated", path=path)
            found = found + more if found else more
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    return found


def read_into(descriptor: int, start: int, buffer: memoryview, path: Path) -> None:
    """Fill a buffer with the bytes at an offset. Raises the errors of `read_at`."""
    done = 0
    try:
        while done < len(buffer):
            more = os.preadv(descriptor, [buffer[done:]], start + done)
            if not more:
                raise CorruptError("is truncated", path=path)
            done += more
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error


def write_at(descriptor: int, start: int, content: bytes | bytearray | memoryview, path: Path) -> None:
    """Write all bytes at an offset.

    Raises:
        StorageError: the operating system cannot write.
    """
    left = memoryview(content)
    try:
        while left:
            done = os.pwrite(descriptor, left, start)
            left, start = left[done:], start + done
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
