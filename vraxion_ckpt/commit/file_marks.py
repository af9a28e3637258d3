"""Marks of files. A changed mark shows that a file was written or replaced. Imports without torch."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# Inode, size and modification time of a file. For a directory only the inode, because its size and time vary.
Mark = tuple[int, ...]


def mark_of(path: Path | str) -> Mark | None:
    """Return the mark of a file or directory; None if it does not exist."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISDIR(status.st_mode):
        return (status.st_ino,)
    return status.st_ino, status.st_size, status.st_mtime_ns


def required_mark(path: Path | str) -> Mark:
    """Return the mark of a file or directory that must exist.

    Raises:
        FileNotFoundError: it does not exist.
    """
    mark = mark_of(path)
    if mark is None:
        raise FileNotFoundError(2, os.strerror(2), str(path))
    return mark


def survey(target: Path) -> dict[str, Mark]:
    """Return the marks of all files in a directory by relative path. A target that is a file has the path ``.``.

    Raises:
        FileNotFoundError: a file was removed while the directory was read.
    """
    if not target.is_dir():
        return {".": required_mark(target)}
    found: dict[str, Mark] = {}
    for folder, folders, names in os.walk(target):
        below = os.path.relpath(folder, target)
        for name in (*names, *(name for name in folders if Path(folder, name).is_symlink())):
            found[name if below == "." else f"{below}/{name}"] = required_mark(f"{folder}/{name}")
    return found
