"""Put a finished result in its place: the old state or the new one, never a mix.

A result is staged beside its target under a name of its own (``.<name>.<txid>.tmp``), flushed to disk, checked by
whoever wrote it, and renamed: that rename is the commit. A file is replaced by rename, a directory is exchanged
with the new one in one system call and only then removed. The final path is never opened for writing.
Imports nothing of torch.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vraxion_ckpt.errors import CkptWarning, StorageError, UsageError

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that cannot, or must not, be written; called before anything is read.

    Raises:
        UsageError: it exists and `overwrite` is false, or its folder is missing or read-only.
    """
    if target.exists() and not overwrite:
        raise UsageError("exists already", path=target, hint="choose a new name, or pass --overwrite to replace it")
    folder = target.parent
    if not folder.is_dir():
        raise UsageError("there is no such folder to write into", path=folder, hint=f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError("the folder is not writable", path=folder)


@dataclass
class Staged:
    """A result in the making.

    Attributes:
        path: where to write it; for a file, nothing is there yet, for a directory, an empty one.
        target: where it goes.
    """

    path: Path
    target: Path
    overwrite: bool

    def flush(self) -> None:
        """Give it the mode bits of what it replaces and flush it to disk, files before folders.

        Raises:
            StorageError: the disk did not take it; an fsync that failed is never tried again.
        """
        try:
            for path in [*_tree(self.path), self.path]:
                old = self.target / path.relative_to(self.path)
                if old.exists() and stat.S_IFMT(old.stat().st_mode) == stat.S_IFMT(path.stat().st_mode):
                    path.chmod(stat.S_IMODE(old.stat().st_mode))
                _fsync(path)
        except OSError as error:
            raise StorageError.from_os_error(error, self.target) from error

    def publish(self) -> None:
        """Rename it to its target: the commit.

        Raises:
            UsageError: the target has appeared meanwhile.
            StorageError: the file system refused; the target is as it was.
        """
        published = False
        try:
            if not self.target.exists():
                _rename_new(self.path, self.target)
            elif not self.overwrite:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            elif self.target.is_dir():
                _rename2(self.path, self.target, _RENAME_EXCHANGE)
            else:
                self.path.replace(self.target)
            published = True
            _fsync(self.target.parent)
        except FileExistsError as error:
            raise UsageError("has appeared meanwhile; nothing was written", path=self.target) from error
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EXDEV) and self.target.is_dir() and not published:
                raise StorageError(
                    "this file system cannot exchange two directories", path=self.target, hint="write to a new path"
                ) from error
            raise StorageError.from_os_error(error, self.target) from error


@contextmanager
def staged(target: Path, *, directory: bool, overwrite: bool) -> Iterator[Staged]:
    """Make a staged name beside `target`; whatever is left under it at the end is removed.

    After an exchange that is the old directory, otherwise a result that was not published.
    """
    path = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    stage = Staged(path, target, overwrite)
    try:
        if directory:
            path.mkdir()
        yield stage
    except StorageError as error:
        # People know the target, not the name it is staged under.
        if error.path is not None and error.path.is_relative_to(path):
            error.path = target / error.path.relative_to(path)
        raise
    except OSError as error:
        raise StorageError.from_os_error(error, error.filename or target) from error
    finally:
        _remove(path)


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


def _tree(path: Path) -> list[Path]:
    """List everything under a directory, contents before their folder; nothing for a file."""
    if not path.is_dir():
        return []
    return sorted(path.rglob("*"), key=lambda entry: (-len(entry.parts), entry))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_new(source: Path, target: Path) -> None:
    """Rename to a name that must not exist; where the file system cannot promise that, look first."""
    try:
        _rename2(source, target, _RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        source.rename(target)


def _rename2(source: Path, target: Path, flags: int) -> None:
    """Call renameat2(2), which Python does not offer."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _remove(path: Path) -> None:
    if not os.path.lexists(path):
        return
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        warnings.warn(f"{path} could not be removed: {error.strerror}", CkptWarning, stacklevel=2)
