"""Change an existing target from its old state to its new one, so that readers never see a mix.

Every change takes the same steps, `Transaction.STEPS`:

===========  ===================================================================================================
``seal``     flush the staged files and a journal to disk
``place``    install files that a reader of the old state does not open
``verify``   check that nothing has changed since it was read
``commit``   exchange the index file, or the whole target, with the staged one, in one system call
``recheck``  if another process wrote at that moment, exchange them back
``finish``   replace or remove files that a reader of the new state does not open
``close``    remove the journal
===========  ===================================================================================================

The index file is the file that a reader opens first and that determines which other files it opens, such as the
``router.state`` of a modular checkpoint. `FileChanges` lists what is done before the commit and what after it.

After a crash, the journal shows whether the commit took place, and so whether to roll back or forward. A file is
replaced or removed only if its mark (inode, size and time) is the one in the journal, so files that a trainer has
saved since are kept.

Imports without torch. Every change of the disk is a call of `vraxion_ckpt.commit.system_calls`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import ClassVar, NoReturn

from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.commit.durability import flush
from vraxion_ckpt.commit.file_marks import Mark, mark_of, required_mark, survey
from vraxion_ckpt.commit.journal import JOURNAL, FileChanges, Journal, dump_journal, load_journal
from vraxion_ckpt.errors import ChangedError, StorageError
from vraxion_ckpt.support import signals

# The targets that this process has committed. A signal that arrives after a commit does not make the run a failure.
committed: set[Path] = set()


@dataclass
class Transaction:
    """A change of an existing target.

    Attributes:
        folder: the stage. Its entry with the target's name is the new state, or a directory of the files that change.
        target: the path to change, a file or a directory.
        change: the files of the target that change at each step.
        keep_old: whether to keep the old state beside the target; possible only if the whole target is exchanged.
        check: a function that raises if a source of the new state has changed.
        watched: the marks of the target's files that must not change. If a mark is only an inode, the file may be
            written but not replaced. If the whole target is exchanged, no file may be added either.
        old: the marks of the files that are replaced or removed.
        new: the marks of the files that replace old files or are added.
        kept: the path of the kept old state; None if it is not kept.
    """

    STEPS: ClassVar[tuple[str, ...]] = ("seal", "place", "verify", "commit", "recheck", "finish", "close")

    folder: Path
    target: Path
    change: FileChanges
    keep_old: bool = False
    check: Callable[[], None] | None = None
    watched: Mapping[str, Mark] = field(default_factory=dict)
    old: dict[str, Mark] = field(default_factory=dict)
    new: dict[str, Mark] = field(default_factory=dict)
    kept: Path | None = None
    _sealed: dict[str, Mark] = field(default_factory=dict)  # the marks of the exchanged files after the commit

    @classmethod
    def load(cls, folder: Path, target: Path) -> Transaction | None:
        """Return the transaction whose journal is in a stage; None if there is no journal or it is incomplete.

        Raises:
            StorageError: see `load_journal`.
        """
        journal = load_journal(folder, target)
        if journal is None:
            return None
        return cls(folder, target, journal.change, journal.keep_old, old=journal.old, new=journal.new)

    def run(self) -> None:
        """Take all steps; signals are deferred from the commit on.

        Raises:
            ChangedError: a watched file or a source has changed.
            StorageError: the target cannot be changed in place.
            OSError: the file system refused.
        """
        with ExitStack() as stack:
            for step in self.STEPS:
                if step == "commit":
                    stack.enter_context(signals.deferred())
                getattr(self, step)()

    def seal(self) -> None:
        """Flush the staged files and the journal, so that they survive a power loss."""
        for mount in mounts_within(self.target):
            message = f"cannot be changed in place, because a file system is mounted on it or in it ({mount})"
            raise StorageError(message, path=self.target, hint="use convert to a new path")
        for name in (self.change.exchanged, *self.change.first, *self.change.later):
            self.new[name] = required_mark(self._staged(name))
        for name in (*self.new, *self.change.removed):
            if (mark := mark_of(self._live(name))) is not None:
                self.old[name] = mark
        self._sealed = {self.change.exchanged: self.new[self.change.exchanged]}
        if self._is_whole:  # without hard links to files of the old state, which another process may still write
            linked = {mark[0] for mark in self.watched.values()}
            self._sealed = {name: mark for name, mark in survey(self._staged(".")).items() if mark[0] not in linked}
        with signals.interruptible():
            flush(self._staged("."), self.target, folders=self._is_whole)
        journal = self.folder / JOURNAL
        content = Journal(self.change, self.keep_old, self.old, self.new)
        system_calls.write_new(journal, dump_journal(content, self.folder))
        system_calls.fsync(journal)
        system_calls.fsync(self.folder)
        system_calls.fsync(self.target.parent)

    def place(self) -> None:
        """Install the files that a reader of the old state does not open."""
        for name in self.change.first:
            self._put(name)
        self._fsync_folders(self.change.first)

    def verify(self) -> None:
        """Check that no watched file and no source has changed.

        Raises:
            ChangedError: a watched file or a source has changed.
        """
        if self.check is not None:
            self.check()
        signals.raise_pending()
        live = os.fspath(self.target)
        moved = self.watched if self._is_whole else self.new
        for name, mark in self.watched.items():
            old = self._where_old(name) if name in moved else f"{live}/{name}"
            if old is not None and (now := mark_of(old)) != mark and (now or ())[: len(mark)] != mark:
                self._raise_changed(name)
        if self._is_whole and self.watched and self._live(".").is_dir():
            old = self._where_old(".")
            for name in sorted(survey(old).keys() - self.watched.keys() if old else ()):
                self._raise_changed(name)  # the added file would be removed with the old state

    def _raise_changed(self, name: str) -> NoReturn:
        hint = "wait for the trainer to finish saving, then run again"
        raise ChangedError("was changed by another process", path=self._live(name), written=(), hint=hint)

    def commit(self) -> None:
        """Exchange the index file, or the whole target, with the staged one.

        Raises:
            StorageError: the file system cannot exchange names, and the old state is a directory or must be kept.
        """
        staged, live = self._staged(self.change.exchanged), self._live(self.change.exchanged)
        try:
            system_calls.exchange(staged, live)
            committed.add(self.target)
        except system_calls.ExchangeUnavailableError as error:
            if live.is_dir() or self.keep_old:
                message = "this file system cannot exchange two names in one step"
                raise StorageError(message, path=self.target, hint="use convert to a new path") from error
            system_calls.rename(staged, live)
            committed.add(self.target)
        system_calls.fsync(live.parent)

    def recheck(self) -> None:
        """Undo the commit if another process wrote between `verify` and `commit`.

        If the file system cannot exchange names, the old index file is gone and nothing can be undone.

        Raises:
            ChangedError: another process wrote.
        """
        staged, live = self._staged(self.change.exchanged), self._live(self.change.exchanged)
        if not staged.exists():
            return
        try:
            self.verify()
        except ChangedError:
            if all(mark_of(self._live(name)) == mark for name, mark in self._sealed.items()):
                system_calls.exchange(staged, live)
                committed.discard(self.target)
                system_calls.fsync(live.parent)
            else:  # the other process has already written into the new state: keep its files
                committed.discard(self.target)
                self.undo()
                self.close()
            raise

    def finish(self) -> None:
        """Replace and remove the files that a reader of the new state does not open; keep the old state if asked to."""
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
        """Remove the journal. If it reappears after a power loss, following it changes nothing."""
        system_calls.unlink(self.folder / JOURNAL)

    def undo(self) -> None:
        """Restore or remove the files that `place` installed. A second call changes nothing."""
        for name in self.change.first:
            if mark_of(self._live(name)) != self.new[name]:
                continue
            if name in self.old:
                system_calls.rename(self._spare(name), self._live(name))
            else:
                system_calls.unlink(self._live(name))
        self._fsync_folders(self.change.first)

    def is_committed(self) -> bool:
        """Tell whether the commit took place. If it did, the new index file, or target, is not in the stage."""
        mark = mark_of(self._staged(self.change.exchanged))
        return mark is None or mark[0] != self.new[self.change.exchanged][0]

    def is_in_place(self) -> bool:
        """Tell whether the new index file, or target, is in place. False if a trainer has saved since the commit."""
        return mark_of(self._live(self.change.exchanged)) == self.new[self.change.exchanged]

    # --- where files are ---

    @property
    def _is_whole(self) -> bool:
        return self.change.exchanged == "."

    def _live(self, name: str) -> Path:
        return self.target / name

    def _staged(self, name: str) -> Path:
        return self.folder / self.target.name / name

    def _spare(self, name: str) -> Path:
        """Return the path at which `_put` keeps the old file."""
        staged = self._staged(name)
        return staged if staged.exists() else staged.with_name(f"{staged.name}.old")

    def _put(self, name: str) -> None:
        """Install a staged file, and keep the file that it replaces in the stage."""
        staged, live = self._staged(name), self._live(name)
        if name not in self.old:
            try:
                system_calls.rename_new(staged, live)
            except FileExistsError:
                self._raise_changed(name)
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
        """Replace a file. Undo the replacement if another process changed the file at the same time."""
        staged, live = self._staged(name), self._live(name)
        try:
            system_calls.exchange(staged, live)
        except system_calls.ExchangeUnavailableError:
            system_calls.rename(staged, live)
            return
        if mark_of(staged) != self.old[name]:
            system_calls.exchange(staged, live)

    def _remove(self, name: str) -> None:
        """Move a file into the stage, which is removed later. Move it back if another process changed it."""
        live, aside = self._live(name), self.folder / f"removed{self.change.removed.index(name)}"
        system_calls.rename_new(live, aside)
        if mark_of(aside) != self.old[name]:
            system_calls.rename_new(aside, live)

    def _where_old(self, name: str) -> Path | None:
        """Return the current path of a file of the old state; None if it no longer exists or only a copy does."""
        if self._is_whole:
            moved = self._staged(name) if self.is_committed() else self._live(name)
            return moved if moved.exists() or self._staged(".").exists() else None
        if name not in self.new or mark_of(self._live(name)) != self.new[name]:
            return self._live(name)
        spare = mark_of(self._spare(name))
        return self._spare(name) if spare and spare[0] == self.old[name][0] else None  # a copy has another inode

    def _fsync_folders(self, names: Iterable[str]) -> None:
        for folder in sorted({self._live(name).parent for name in names}):
            if folder.is_dir():  # false if the checkpoint was removed after a run on it was killed
                system_calls.fsync(folder)


def mounts_within(target: Path) -> list[str]:
    """List the mount points at and below a path, because no rename can cross them. Empty without ``/proc``."""
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # without /proc, a rename across a mount point fails
        return []
    escaped = str(target).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    points = (line.split(" ")[4] for line in table.splitlines())
    return [point for point in points if point == escaped or point.startswith(f"{escaped}/")]


def _rename_aside(path: Path, target: Path) -> Path:
    """Rename to the target's name with ``.old``, or with ``.old2`` and so on if that exists."""
    for number in count(1):
        kept = target.with_name(f"{target.name}.old{number if number > 1 else ''}")
        with suppress(FileExistsError):
            system_calls.rename_new(path, kept)
            return kept
    raise AssertionError("unreachable")
