"""Marks of files. A changed mark shows that a file was written or replaced. Imports without torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
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
    return dict(_marks_below(os.fspath(target), ""))


def _marks_below(root: str, folder: str) -> Iterator[tuple[str, Mark]]:
    """Yield relative path and mark of the files in a folder. Nothing is yielded for a folder that cannot be listed."""
    try:
        with os.scandir(f"{root}/{folder}") as entries:
            listed = [(folder + entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    except OSError:
        return
    for name, is_folder in listed:
        if is_folder:
            yield from _marks_below(root, f"{name}/")
        else:
            yield name, required_mark(f"{root}/{name}")
