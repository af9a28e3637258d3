"""The journal of a transaction: which files it replaces, so that a later run can roll it back or forward.

The journal is flushed before the first change of the target, and removed after the last one. Imports without torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from vraxion_ckpt.commit.file_marks import Mark
from vraxion_ckpt.errors import StorageError

JOURNAL = "journal.json"


@dataclass(frozen=True)
class FileChanges:
    """The files that a transaction changes at each step. Paths are relative to the target.

    Attributes:
        exchanged: the file that the commit exchanges: the index file, which readers open first and which determines
            the other files that they open. It is ``.`` if the commit exchanges the whole target.
        first: files that are added or replaced before the commit; a reader of the old state does not open them.
        later: files that are replaced after the commit; a reader of the new state does not open the old ones.
        removed: files that are removed after the commit; a reader of the new state does not open them.
    """

    exchanged: str = "."
    first: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Journal:
    """The content of a journal.

    Attributes:
        change: the files that change.
        keep_old: whether the old state is kept beside the target.
        old: the marks of the files that are replaced or removed.
        new: the marks of the files that replace old files or are added.
    """

    change: FileChanges
    keep_old: bool = False
    old: dict[str, Mark] = field(default_factory=dict)
    new: dict[str, Mark] = field(default_factory=dict)


def dump_journal(journal: Journal, folder: Path) -> bytes:
    """Return a journal as JSON, together with the inode of `folder`, the stage that it belongs to."""
    change = journal.change
    content = {
        "version": 1,
        "stage": folder.stat().st_ino,
        # Version 1 of the journal calls the exchanged file "pivot"; journals of earlier releases must stay readable.
        "change": {"pivot": change.exchanged, "first": change.first, "later": change.later, "removed": change.removed},
        "keep_old": journal.keep_old,
        "old": journal.old,
        "new": journal.new,
    }
    return json.dumps(content, indent=2).encode()


def load_journal(folder: Path, target: Path) -> Journal | None:
    """Return the journal in the stage `folder` of `target`; None if there is none or it is incomplete.

    The journal is flushed before the target is changed, so an incomplete one means that nothing was changed.

    Raises:
        StorageError: the journal cannot be read, is not of this version, or belongs to another stage.
    """
    path = folder / JOURNAL
    if not os.path.lexists(path):
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    except (ValueError, RecursionError):
        return None
    try:
        parts = facts["change"]
        change = FileChanges(parts["pivot"], tuple(parts["first"]), tuple(parts["later"]), tuple(parts["removed"]))
        old, new = ({name: tuple(mark) for name, mark in facts[key].items()} for key in ("old", "new"))
        known = facts["version"] == 1 and {change.exchanged, *change.first, *change.later} == new.keys()
        known &= {change.exchanged, *change.later, *change.removed} <= old.keys()
        known &= all(len(mark) in (1, 3) for mark in (*old.values(), *new.values()))
        known &= all(_lies_within(target, name) for name in (*old, *new))
        if known and facts["stage"] != folder.stat().st_ino:
            message = "a run was killed, and then its files were copied or restored, so it cannot be rolled back"
            hint = "see the manual on how to recover by hand, or use the original"
            raise StorageError(message, path=folder, hint=hint)
        if known:
            return Journal(change, facts["keep_old"], old, new)
    except (TypeError, KeyError, AttributeError, ValueError):
        pass
    hint = "a newer version may have written it; use that version, or see the manual on how to recover by hand"
    raise StorageError("is not a journal of this version", path=path, hint=hint)


def _lies_within(target: Path, name: str) -> bool:
    """Tell whether a relative path stays inside the target when the links to its folder are followed."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        return False
    return name == "." or (target / name).parent.resolve().is_relative_to(target.resolve())
