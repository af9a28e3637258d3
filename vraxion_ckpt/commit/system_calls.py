"""The system calls with which the commit protocol changes the disk.

Renaming and exchanging are atomic: after a crash, they are complete or not made. `write_new`, `copy` and `remove` may
be incomplete. Other modules change the disk only through this module, so tests can record each call or make it fail.
Imports without torch.
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
# Errors of renameat2(2) if the file system, the kernel or the C library does not support it.
_UNSUPPORTED_ERRNOS = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP)
# Errors of link(2) if links are unsupported, too many, or forbidden to this user (fs.protected_hardlinks).
_NO_LINKS = (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class ExchangeUnavailableError(OSError):
    """The file system cannot exchange two names in one step."""


def write_new(path: Path, content: bytes) -> None:
    """Write a new file.

    Raises:
        StorageError: it exists already, or the file system refused.
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
    """Flush a file's bytes, or a directory's entries, to disk.

    Raises:
        OSError: the flush failed; the error names `path`.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a file, replacing `target` if it exists."""
    source.replace(target)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file to a name that must not exist. The check is atomic only if the file system supports it.

    Raises:
        FileExistsError: the new name exists.
    """
    try:
        _rename2(source, target, _RENAME_NOREPLACE)
    except ExchangeUnavailableError:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        source.rename(target)


def exchange(one: Path, other: Path) -> None:
    """Exchange the names of two files or directories in one step.

    Raises:
        ExchangeUnavailableError: the file system does not support it.
    """
    _rename2(one, other, _RENAME_EXCHANGE)


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link to a file, or a copy where hard links are not possible; symbolic links are not followed."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        copy(source, target)


def copy(source: Path, target: Path) -> None:
    """Copy a file with its times and mode. Copy a symbolic link as a link; make a hard link to a pipe."""
    if source.is_symlink() or source.is_file():
        shutil.copy2(source, target, follow_symlinks=False)
    else:
        os.link(source, target)


def copy_mode_and_owner(path: Path, model: Path) -> None:
    """Copy the mode bits of `model` to `path`, and the group and owner if this user may change them."""
    wanted, found = model.stat(), path.stat()
    if wanted.st_gid != found.st_gid:
        with contextlib.suppress(OSError):
            os.chown(path, -1, wanted.st_gid)
    if wanted.st_uid != found.st_uid:
        with contextlib.suppress(OSError):
            os.chown(path, wanted.st_uid, -1)
    path.chmod(stat.S_IMODE(wanted.st_mode))  # last, because chown clears some bits


def unlink(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def rmdir(path: Path) -> None:
    """Remove an empty directory."""
    path.rmdir()


def remove(path: Path) -> None:
    """Remove a file, or a directory with its contents, if it exists."""
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
