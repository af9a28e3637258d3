"""Change a target that exists: from the old state to the new one, never a mix.

Whatever changes, the steps are the same, `Transaction.STEPS`:

==============  ====================================================================================================
``seal``        flush what is staged to disk, and a journal of what goes where
``place``       put in place what nobody takes notice of who reads the old state
``verify``      nothing has changed since it was read
``commit``      exchange the pivot, in one system call: here old becomes new
``look_again``  whoever wrote at that very moment is not overwritten: exchange back
``finish``      put in place, or remove, what nobody takes notice of who reads the new state
``close``       remove the journal: nothing is left to be done or undone
==============  ====================================================================================================

The pivot is what a reader looks at first and what decides what else counts: a file of a directory, such as a
modular checkpoint's ``router.state``, or the whole target. A `FileChanges` says which files stand on which side of it.

Where a run was killed, its journal tells on which side of the commit that was, and so whether to take back what was
placed, or to finish. Nothing is put back, replaced or removed that is not, by inode, size and time, what the journal
says; so a trainer that has gone on meanwhile loses nothing.

Imports nothing of torch. Every change of the disk is a call of `vraxion_ckpt.commit.system_calls`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import ClassVar, NoReturn

from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.errors import ChangedError, StorageError
from vraxion_ckpt.support import signals

JOURNAL = "journal.json"
# Inode, size and time of the last change of a file; of a directory, whose size and time tell nothing, the inode.
Mark = tuple[int, ...]

# What this process has put in place: who is interrupted afterwards has been interrupted too late.
committed: set[Path] = set()


@dataclass(frozen=True)
class FileChanges:
    """Which files of a target a transaction changes, relative to it, and on which side of the commit.

    Attributes:
        pivot: what decides which state it is; ``.`` is the target as a whole.
        first: what is put in place before the commit; who reads the old state takes no notice of it.
        later: files that are replaced after the commit; who reads the new state takes no notice of what was there.
        removed: what is removed after the commit; who reads the new state takes no notice of it.
    """

    pivot: str = "."
    first: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


@dataclass
class Transaction:
    """A change of a target that exists, from the old state to the new one.

    Attributes:
        folder: its stage, which holds the new state, or the part of it that changes, under the target's name.
        target: a file or a directory.
        change: which of its files, and on which side of the commit.
        keep_old: leave the previous state beside the target, where that is exchanged as a whole.
        check: raises if something outside has changed that the new state was made from.
        watched: files of the target that must not change meanwhile; a mark of an inode alone means that it must stay
            the same file. Where the target is exchanged as a whole, no others must come.
        old: what is going to be replaced or removed.
        new: what takes its place.
        kept: where the previous state was left.
    """

    STEPS: ClassVar[tuple[str, ...]] = ("seal", "place", "verify", "commit", "look_again", "finish", "close")

    folder: Path
    target: Path
    change: FileChanges
    keep_old: bool = False
    check: Callable[[], None] | None = None
    watched: Mapping[str, Mark] = field(default_factory=dict)
    old: dict[str, Mark] = field(default_factory=dict)
    new: dict[str, Mark] = field(default_factory=dict)
    kept: Path | None = None
    _sealed: dict[str, Mark] = field(default_factory=dict)  # what is live after the commit, if nobody writes

    def run(self) -> None:
        """Go through the steps; from the commit on, no signal stops them."""
        with ExitStack() as stack:
            for step in self.STEPS:
                if step == "commit":
                    stack.enter_context(signals.deferred())
                getattr(self, step)()

    def seal(self) -> None:
        """Flush what is staged, and the journal, so that no power loss can take them away from here on."""
        for place in mounts_within(self.target):
            message = f"has a file system mounted on it, or in it ({place}), and cannot be changed from beside it"
            raise StorageError(message, path=self.target, hint="use convert to a new path")
        for name in (self.change.pivot, *self.change.first, *self.change.later):
            self.new[name] = _expect(self._staged(name))
        for name in (*self.new, *self.change.removed):
            if (mark := mark_of(self._live(name))) is not None:
                self.old[name] = mark
        self._sealed = {self.change.pivot: self.new[self.change.pivot]}
        if self.change.pivot == ".":  # but for what the old state has linked in, too
            linked = {mark[0] for mark in self.watched.values()}
            self._sealed = {name: mark for name, mark in survey(self._staged(".")).items() if mark[0] not in linked}
        with signals.interruptible():
            flush(self._staged("."), self.target, folders=self.change.pivot == ".")
        journal = self.folder / JOURNAL
        system_calls.write_new(journal, self._dump())
        system_calls.fsync(journal)
        system_calls.fsync(self.folder)
        system_calls.fsync(self.target.parent)

    def place(self) -> None:
        """Put in place what is not looked at yet."""
        for name in self.change.first:
            self._put(name)
        self._fsync_folders(self.change.first)

    def verify(self) -> None:
        """Refuse to go on if anybody has written meanwhile."""
        if self.check is not None:
            self.check()
        signals.raise_pending()
        for name, mark in self.watched.items():
            place = self._where_old(name)
            if place is not None and (mark_of(place) or ())[: len(mark)] != mark:
                self._give_up(name)
        if self.change.pivot == "." and self.watched and self._live(".").is_dir():
            old = self._where_old(".")
            for name in sorted(survey(old).keys() - self.watched.keys() if old else ()):
                self._give_up(name)  # it would go with the old state

    def _give_up(self, name: str) -> NoReturn:
        raise ChangedError(
            "changed meanwhile",
            path=self._live(name),
            written=(),
            hint="wait for the trainer to finish saving, then run again",
        )

    def commit(self) -> None:
        """Let the pivot and its successor change places."""
        staged, live = self._staged(self.change.pivot), self._live(self.change.pivot)
        try:
            system_calls.exchange(staged, live)
            committed.add(self.target)
        except system_calls.ExchangeUnavailableError as error:
            if live.is_dir() or self.keep_old:
                raise StorageError(
                    "this file system cannot exchange two names in one step",
                    path=self.target,
                    hint="use convert to a new path",
                ) from error
            system_calls.rename(staged, live)
            committed.add(self.target)
        system_calls.fsync(live.parent)

    def look_again(self) -> None:
        """Let the pivots change places once more if anybody has written at that very moment.

        Where the old pivot is gone, since they could not be exchanged, there is no way back.
        """
        staged, live = self._staged(self.change.pivot), self._live(self.change.pivot)
        if not staged.exists():
            return
        try:
            self.verify()
        except ChangedError:
            if all(mark_of(self._live(name)) == mark for name, mark in self._sealed.items()):
                system_calls.exchange(staged, live)
                committed.discard(self.target)
                system_calls.fsync(live.parent)
            else:  # they have written into the new state already, and go on: what they leave is theirs
                committed.discard(self.target)
                self.undo()
                self.close()
            raise

    def finish(self) -> None:
        """Put in place what is not looked at any more, and remove or keep what the old state has left."""
        if self.is_in_place():
            for name in self.change.later:
                if mark_of(self._live(name)) == self.old[name]:
                    self._replace(name)
            for name in self.change.removed:
                if mark_of(self._live(name)) == self.old[name]:
                    self._remove(name)
            self._fsync_folders((*self.change.later, *self.change.removed))
        if self.keep_old and self._staged(".").exists():
            self.kept = _rename_aside(self._staged("."), self.target)
            system_calls.fsync(self.target.parent)

    def close(self) -> None:
        """Remove the journal; one that a power loss brings back finds nothing more that is as it says."""
        system_calls.unlink(self.folder / JOURNAL)

    def undo(self) -> None:
        """Take back what was placed; done twice, it is as done once."""
        for name in self.change.first:
            if mark_of(self._live(name)) != self.new[name]:
                continue
            if name in self.old:
                system_calls.rename(self._spare(name), self._live(name))
            else:
                system_calls.unlink(self._live(name))
        self._fsync_folders(self.change.first)

    def is_committed(self) -> bool:
        """Tell on which side of the commit it stands: the new pivot has left the stage."""
        mark = mark_of(self._staged(self.change.pivot))
        return mark is None or mark[0] != self.new[self.change.pivot][0]

    def is_in_place(self) -> bool:
        """Tell whether the pivot is the new one, as it was made; after the commit it is not if somebody has saved."""
        return mark_of(self._live(self.change.pivot)) == self.new[self.change.pivot]

    # --- where things are ---

    def _live(self, name: str) -> Path:
        return self.target / name

    def _staged(self, name: str) -> Path:
        return self.folder / self.target.name / name

    def _spare(self, name: str) -> Path:
        """Return where the old file is after `_put`."""
        staged = self._staged(name)
        return staged if staged.exists() else staged.with_name(f"{staged.name}.old")

    def _put(self, name: str) -> None:
        """Put one file in place; of one that it replaces, the old is in the stage afterwards."""
        staged, live = self._staged(name), self._live(name)
        if name not in self.old:
            try:
                system_calls.rename_new(staged, live)
            except FileExistsError:
                self._give_up(name)
            return
        try:
            system_calls.exchange(staged, live)
        except system_calls.ExchangeUnavailableError:
            spare = staged.with_name(f"{staged.name}.old")
            system_calls.link_or_copy(live, spare)
            system_calls.fsync(spare)
            system_calls.fsync(spare.parent)
            system_calls.rename(staged, live)

    def _replace(self, name: str) -> None:
        """Put one file in place for good, unless what it was to replace is not what it was."""
        staged, live = self._staged(name), self._live(name)
        try:
            system_calls.exchange(staged, live)
        except system_calls.ExchangeUnavailableError:
            system_calls.rename(staged, live)
            return
        if mark_of(staged) != self.old[name]:
            system_calls.exchange(staged, live)

    def _remove(self, name: str) -> None:
        """Move one file into the stage, which will be removed; back if it is not what it was."""
        live, aside = self._live(name), self.folder / f"removed{self.change.removed.index(name)}"
        system_calls.rename_new(live, aside)
        if mark_of(aside) != self.old[name]:
            system_calls.rename_new(aside, live)

    def _where_old(self, name: str) -> Path | None:
        """Return where a file of the old state is by now, or None if it is no more."""
        if self.change.pivot == ".":
            moved = self._staged(name) if self.is_committed() else self._live(name)
            return moved if moved.exists() or self._staged(".").exists() else None
        if name not in self.new or mark_of(self._live(name)) != self.new[name]:
            return self._live(name)
        spare = mark_of(self._spare(name))
        return self._spare(name) if spare and spare[0] == self.old[name][0] else None  # a copy of it tells nothing

    def _fsync_folders(self, names: Iterable[str]) -> None:
        for folder in sorted({self._live(name).parent for name in names}):
            if folder.is_dir():  # a checkpoint may have been removed since a run on it was killed
                system_calls.fsync(folder)

    # --- the journal ---

    def _dump(self) -> bytes:
        facts = {"change": asdict(self.change), "keep_old": self.keep_old, "old": self.old, "new": self.new}
        return json.dumps({"version": 1, "stage": self.folder.stat().st_ino, **facts}, indent=2).encode()

    @classmethod
    def load(cls, folder: Path, target: Path) -> Transaction | None:
        """Return the transaction that a stage holds the journal of; None if it has none, or not a whole one.

        A journal is flushed before anything of the target is touched, so one that is not whole speaks of nothing.

        Raises:
            StorageError: it is whole, and not what this version writes.
        """
        journal = folder / JOURNAL
        if not os.path.lexists(journal):
            return None
        try:
            facts = json.loads(journal.read_text(encoding="utf-8")) if journal.is_file() else {}
        except OSError as error:
            raise StorageError.from_os_error(error, journal) from error
        except (ValueError, RecursionError):
            return None
        try:
            parts = facts["change"]
            change = FileChanges(parts["pivot"], tuple(parts["first"]), tuple(parts["later"]), tuple(parts["removed"]))
            old, new = ({name: tuple(mark) for name, mark in facts[key].items()} for key in ("old", "new"))
            known = facts["version"] == 1 and {change.pivot, *change.first, *change.later} == new.keys()
            known &= {change.pivot, *change.later, *change.removed} <= old.keys()
            known &= all(len(mark) in (1, 3) for mark in (*old.values(), *new.values()))
            known &= all(_lies_within(target, name) for name in (*old, *new))
            if known and facts["stage"] != folder.stat().st_ino:
                message = "a run was killed, and then its files were copied or restored: nobody can tell what it did"
                hint = "see the manual on how to recover by hand, or use the original"
                raise StorageError(message, path=folder, hint=hint)
            if known:
                return cls(folder, target, change, facts["keep_old"], old=old, new=new)
        except (TypeError, KeyError, AttributeError, ValueError):
            pass
        hint = "a newer version may have written it; use that, or see the manual on how to recover by hand"
        raise StorageError("is no journal of this version", path=journal, hint=hint)


def _lies_within(target: Path, name: str) -> bool:
    """Tell whether a name leads to a file below the target, and not through a link out of it."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        return False
    return name == "." or (target / name).parent.resolve().is_relative_to(target.resolve())


def mounts_within(target: Path) -> list[str]:
    """List the mount points at and below a path: from there nothing can be renamed to beside it, or back."""
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # no Linux, or no /proc; then a rename fails where a file system ends
        return []
    escaped = str(target).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    points = (line.split(" ")[4] for line in table.splitlines())
    return [point for point in points if point == escaped or point.startswith(f"{escaped}/")]


def mark_of(path: Path | str) -> Mark | None:
    """Return what changes when a file is written or replaced; None where there is nothing."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISDIR(status.st_mode):
        return (status.st_ino,)
    return status.st_ino, status.st_size, status.st_mtime_ns


def survey(target: Path) -> dict[str, Mark]:
    """Mark every file of a target by its path below it; of a target that is a file, ``.``."""
    if not target.is_dir():
        return {".": _expect(target)}
    found: dict[str, Mark] = {}
    for folder, folders, names in os.walk(target):
        below = os.path.relpath(folder, target)
        for name in (*names, *(name for name in folders if Path(folder, name).is_symlink())):
            found[name if below == "." else f"{below}/{name}"] = _expect(f"{folder}/{name}")
    return found


def _expect(path: Path | str) -> Mark:
    mark = mark_of(path)
    if mark is None:
        raise FileNotFoundError(2, os.strerror(2), str(path))
    return mark


def flush(path: Path, target: Path, *, folders: bool = True) -> None:
    """Give what is staged the mode bits and the owner of what it replaces, and flush it, files before folders.

    A new file beside old ones is made like one of them. `folders` tells whether the staged ones will be in the target.
    An fsync that failed is never tried again: the kernel may have dropped what it could not write.
    """
    for entry in (*_tree(path), path):
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            continue  # other people's: a link, a pipe
        old = target / entry.relative_to(path)
        model = old if old.exists() else _sibling(old) if entry != path else None
        if model and not model.samefile(entry) and model.is_dir() == entry.is_dir() and (folders or entry.is_file()):
            system_calls.like(entry, model)
        system_calls.fsync(entry)


def _sibling(path: Path) -> Path | None:
    """Return a file beside a new one, of its own kind if there is one; None in a new folder."""
    if path.parent.is_symlink() or not path.parent.is_dir() or path.is_dir():
        return None
    files = [file for file in sorted(path.parent.iterdir()) if file.is_file() and not file.is_symlink()]
    return next((file for file in files if file.suffix == path.suffix), files[0] if files else None)


def _tree(path: Path) -> list[Path]:
    """List everything under a directory, contents before their folder; nothing for a file."""
    if not path.is_dir() or path.is_symlink():
        return []
    return sorted(path.rglob("*"), key=lambda entry: (-len(entry.parts), entry))


def _rename_aside(path: Path, target: Path) -> Path:
    """Rename to the target's name with ``.old``, or ``.old2`` and so on where that is taken."""
    for number in count(1):
        kept = target.with_name(f"{target.name}.old{number if number > 1 else ''}")
        with suppress(FileExistsError):
            system_calls.rename_new(path, kept)
            return kept
    raise AssertionError("numbers do not end")
