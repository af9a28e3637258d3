"""The system calls that change a disk, as few and as small as the commit protocol needs them.

Each function makes one change that a crash leaves either done or not done. `vraxion_ckpt.commit.staging` calls them by
this module, and nothing else there touches the disk; so whoever replaces them sees, counts or breaks every step of it.
Imports nothing of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from pathlib import Path

from vraxion_ckpt.errors import StorageError

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100
# What renameat2(2) says where the file system, the kernel or the C library does not have it.
_UNSUPPORTED_ERRNOS = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP)


# What link(2) says where there are no links, or no more, or none for this user (fs.protected_hardlinks).
_NO_LINKS = (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class ExchangeUnavailableError(OSError):
    """This file system cannot exchange two names in one step."""


def write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet.

    Raises:
        StorageError: it exists, or the file system refused.
    """
    try:
        with path.open("xb") as file:
            file.write(content)
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error


def mkdir(path: Path, mode: int = 0o777) -> None:
    """Make a directory; its parent must exist."""
    path.mkdir(mode)


def fsync(path: Path) -> None:
    """Flush a file's bytes, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a file over another."""
    source.replace(target)


def rename_new(source: Path, target: Path) -> None:
    """Rename to a name that must not exist; where the file system cannot promise that, look first."""
    try:
        _rename2(source, target, _RENAME_NOREPLACE)
    except ExchangeUnavailableError:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        source.rename(target)


def exchange(one: Path, other: Path) -> None:
    """Exchange what two names stand for, files or directories, in one step.

    Raises:
        ExchangeUnavailableError: the file system does not have that.
    """
    _rename2(one, other, _RENAME_EXCHANGE)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; where links fail (too many, or none on this file system), copy it.

    A symbolic link is linked as such.
    """
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        copy(source, target)


def copy(source: Path, target: Path) -> None:
    """Copy a file with its times and mode; a symbolic link is copied as such, and a pipe gets a second name."""
    if source.is_symlink() or source.is_file():
        shutil.copy2(source, target, follow_symlinks=False)
    else:
        os.link(source, target)


def like(path: Path, model: Path) -> None:
    """Give a file or directory the mode bits of another, and as far as this user may, its group and its owner."""
    wanted, found = model.stat(), path.stat()
    if wanted.st_gid != found.st_gid:
        with contextlib.suppress(OSError):
            os.chown(path, -1, wanted.st_gid)
    if wanted.st_uid != found.st_uid:
        with contextlib.suppress(OSError):
            os.chown(path, wanted.st_uid, -1)
    path.chmod(stat.S_IMODE(wanted.st_mode))  # last: a change of owner clears some bits


def unlink(path: Path) -> None:
    """Remove a file's name."""
    path.unlink()


def rmdir(path: Path) -> None:
    """Remove an empty directory."""
    path.rmdir()


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it; nothing if there is nothing."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        unlink(path)
        return
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        path.chmod(0o700)
    for entry in sorted(path.iterdir()):
        remove(entry)
    rmdir(path)


def _rename2(source: Path, target: Path, flags: int) -> None:
    """Call renameat2(2), which Python does not offer."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        raise ExchangeUnavailableError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(target)) from None
    if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags):
        code = ctypes.get_errno()
        kind = ExchangeUnavailableError if code in _UNSUPPORTED_ERRNOS else OSError
        raise kind(code, os.strerror(code), str(target))
