"""Give staged files the mode and owner of the files that they replace, and flush them. Imports without torch."""

from __future__ import annotations

import os
from pathlib import Path

from vraxion_ckpt.commit import system_calls


def flush(path: Path, target: Path, *, folders: bool = True) -> None:
    """Give each staged file the mode and owner of the file that it replaces, and fsync it, a folder after its contents.

    A file that replaces none gets the mode and owner of another file in its target folder. A failed fsync is not tried
    again, because the kernel may already have dropped the data.

    Args:
        path: the staged file or directory.
        target: the file or directory that `path` replaces, if it exists.
        folders: whether staged folders become part of the target. If so, they get mode and owner too.

    Raises:
        OSError: the file system refused.
    """
    for entry in (*_tree(path), path):
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            continue  # a link or pipe of the user, which was moved here and not written
        old = target / entry.relative_to(path)
        model = old if old.exists() else _sibling(old) if entry != path else None
        if model and not model.samefile(entry) and model.is_dir() == entry.is_dir() and (folders or entry.is_file()):
            system_calls.copy_mode_and_owner(entry, model)
        system_calls.fsync(entry)


def _sibling(path: Path) -> Path | None:
    """Return another file in the folder of the new file `path`, if possible with its suffix; None if there is none."""
    if path.parent.is_symlink() or not path.parent.is_dir() or path.is_dir():
        return None
    with os.scandir(path.parent) as entries:  # a folder may have thousands of files
        names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    alike = [name for name in names if name.endswith(path.suffix)]
    return path.parent / min(alike or names) if names else None


def _tree(path: Path) -> list[Path]:
    """List everything in a directory, each folder after its contents. The list is empty for a file."""
    if not path.is_dir() or path.is_symlink():
        return []
    return sorted(path.rglob("*"), key=lambda entry: (-len(entry.parts), entry))
