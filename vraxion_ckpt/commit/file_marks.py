"""Marks of files: detect that a file was written or replaced, without reading its content. Imports without torch."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# Inode, size and modification time of a file; only the inode of a directory, whose size and time say nothing.
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
    """Return the mark of each file in a directory, by relative path; for a single file, its mark under ``.``.

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
