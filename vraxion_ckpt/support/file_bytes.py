"""Read bytes at an offset of an open file. Imports without torch."""

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
