"""Flush staged files to disk, with the mode and owner of the files that they replace. Imports without torch."""

from __future__ import annotations

from pathlib import Path

from vraxion_ckpt.commit import system_calls


def flush(path: Path, target: Path, *, folders: bool = True) -> None:
    """Copy mode bits and owner to staged files from the files that they replace, and fsync them, files before folders.

    A file without a predecessor is given the mode and owner of another file in its folder. A failed fsync is not tried
    again, because the kernel may already have dropped the data.

    Args:
        path: the staged file or directory.
        target: the file or directory that it replaces; may not exist.
        folders: whether staged folders become part of the target, so that they are given mode and owner too.

    Raises:
        OSError: the file system refused.
    """
    for entry in (*_tree(path), path):
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            continue  # a link or pipe of the user's, which was only moved here
        old = target / entry.relative_to(path)
        model = old if old.exists() else _sibling(old) if entry != path else None
        if model and not model.samefile(entry) and model.is_dir() == entry.is_dir() and (folders or entry.is_file()):
            system_calls.copy_mode_and_owner(entry, model)
        system_calls.fsync(entry)


def _sibling(path: Path) -> Path | None:
    """Return another file in the folder of a new file, preferably with the same suffix; None if there is none."""
    if path.parent.is_symlink() or not path.parent.is_dir() or path.is_dir():
        return None
    files = [file for file in sorted(path.parent.iterdir()) if file.is_file() and not file.is_symlink()]
    return next((file for file in files if file.suffix == path.suffix), files[0] if files else None)


def _tree(path: Path) -> list[Path]:
    """List everything in a directory, each folder after its contents; nothing for a file."""
    if not path.is_dir() or path.is_symlink():
        return []
    return sorted(path.rglob("*"), key=lambda entry: (-len(entry.parts), entry))
