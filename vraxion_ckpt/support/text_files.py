"""Read small files that a user names: only regular files of limited size, opened without blocking.

Imports without torch.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vraxion_ckpt.errors import LimitError, StorageError, UsageError

_PIECE = 2**20


@contextmanager
def opened(path: Path, *, most: int) -> Iterator[BinaryIO]:
    """Open a regular file of at most `most` bytes for reading.

    Pipes, devices, sockets and directories are rejected without waiting for another process.

    Raises:
        UsageError: the file does not exist or is not a regular file.
        LimitError: the file is larger than `most`.
        StorageError: the file cannot be read.
    """
    try:
        descriptor = _descriptor(path)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise UsageError("is not a regular file", path=path)
        with os.fdopen(descriptor, "rb") as file:
            if status.st_size > most:
                raise LimitError(f"is larger than {most} bytes", path=path)
            yield file
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error


def _descriptor(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise UsageError("no such file", path=path) from error
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device without a driver
            raise UsageError("is not a regular file", path=path) from error
        raise
    except ValueError:  # a NUL character, or a lone surrogate
        raise UsageError(f"{str(path)!r} is not a valid path") from None


def read_text(path: Path, *, most: int, encoding: str = "utf-8") -> str:
    """Return the text of a regular file of at most `most` bytes.

    Args:
        path: the file.
        most: the limit, in bytes.
        encoding: ``utf-8``, or ``utf-8-sig`` to skip a byte order mark.

    Raises:
        UsageError: see `opened`.
        LimitError: see `opened`.
        StorageError: see `opened`.
        UnicodeDecodeError: the file is not UTF-8.
    """
    content = bytearray()
    with opened(path, most=most) as file:
        while piece := file.read(_PIECE):
            content += piece
            if len(content) > most:  # the file grows, or reports no size, as in /proc
                raise LimitError(f"is larger than {most} bytes", path=path)
    return content.decode(encoding)
