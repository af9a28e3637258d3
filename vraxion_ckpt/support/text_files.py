"""Small files that a user names: regular ones of bounded size only, opened without waiting.

Imports nothing of torch.
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

    A pipe, a device, a socket or a directory is refused at once: nothing waits for its other end.

    Raises:
        UsageError: there is no such file, or it is not a regular one.
        LimitError: it is larger.
        StorageError: it cannot be read.
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
    except ValueError:  # NUL, or what is not UTF-8
        raise UsageError(f"{str(path)!r} is no path") from None


def read_text(path: Path, *, most: int, encoding: str = "utf-8") -> str:
    """Return the text of a file.

    Args:
        path: as for `opened`.
        most: as for `opened`.
        encoding: ``utf-8``, or ``utf-8-sig`` to leave out a byte order mark.

    Raises:
        CkptError: as for `opened`.
        UnicodeDecodeError: it is not UTF-8.
    """
    content = bytearray()
    with opened(path, most=most) as file:
        while piece := file.read(_PIECE):
            content += piece
            if len(content) > most:  # it grows, or has no size, like what is in /proc
                raise LimitError(f"is larger than {most} bytes", path=path)
    return content.decode(encoding)
