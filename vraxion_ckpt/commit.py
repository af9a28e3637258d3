"""Put a finished result in its place: the old state or the new one, never a mix.

What is to come is staged beside its target, as ``.<name>.<txid>.stage/<name>``. A new target is renamed into place. A
target that exists is changed in a transaction, which is one list of steps, `Transaction.STEPS`, whatever changes:

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
modular checkpoint's ``router.state``, or the whole target. A `Change` says which files stand on which side of it.

A run that is killed leaves its stage. Whoever holds the lock next finds out by the journal on which side of the commit
it died, and takes back what was placed, or finishes (`exclusive`). The same happens at once in a run that fails.
Nothing is put back, replaced or removed that is not, by inode, size and time, what the journal says; so a trainer
that has gone on meanwhile loses nothing.

Imports nothing of torch. Every change of the disk is a call of `vraxion_ckpt.disk`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import ClassVar

from filelock import FileLock, Timeout

from vraxion_ckpt import disk, signals
from vraxion_ckpt.errors import BusyError, ChangedError, CkptError, CkptWarning, StorageError, UsageError

_JOURNAL = "journal.json"
# Inode, size and time of the last change of a file; of a directory, whose size and time tell nothing, the inode.
Mark = tuple[int, ...]

# What this process has put in place: who is interrupted afterwards has been interrupted too late.
committed: set[Path] = set()


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


# --- one run at a time ---


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the lock of a target, after what dead runs have left of it was brought to an end.

    The lock is a file beside the target, since a directory's inode may be exchanged; it is gone afterwards.

    Raises:
        BusyError: another run holds it.
        StorageError: the file system refuses, or has no locks.
    """
    place = target.with_name(f".{target.name}.vraxion-ckpt.lock")
    lock = FileLock(place, fallback_to_soft=False, is_singleton=False, thread_local=False)
    try:
        _acquire(lock)
    except Timeout:
        hint = "wait for it to end; if none is running on this machine, one on another may be"
        raise BusyError("another run is at work on it", path=target, hint=hint) from None
    except OSError as error:
        raise StorageError.from_os_error(error, place) from error
    try:
        for folder in leftovers(target):
            settle(folder, target)
        yield
    finally:
        with signals.put_off():
            with suppress(OSError):
                _twice(disk.unlink, place)  # before the release: who has opened it meanwhile then sees that it is gone
            lock.release()


def _acquire(lock: FileLock) -> None:
    """Take the lock at once, or not at all; a holder that has just removed its file is no reason to give up."""
    for last in (False, False, True):
        try:
            lock.acquire(blocking=False)
            return
        except Timeout:
            if last:
                raise


def leftovers(target: Path) -> list[Path]:
    """List the stages beside a target: those of a run that is at work, and those of dead ones."""
    staged = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.stage")
    try:
        with os.scandir(target.parent) as entries:
            names = [e.name for e in entries if staged.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise StorageError.from_os_error(error, target.parent) from error
    return [target.with_name(name) for name in sorted(names)]


def was_interrupted(target: Path) -> bool:
    """Tell whether a run has begun to change a target and has not brought it to an end."""
    try:
        return any((folder / _JOURNAL).exists() for folder in leftovers(target))
    except StorageError:
        return False


def settle(folder: Path, target: Path) -> None:
    """Bring a stage to an end, whoever has left it: take back or finish what its journal says, and remove it.

    Raises:
        StorageError: the target could be brought neither to the old state nor to the new one.
    """
    with signals.put_off():
        if not _is_ours(folder, target):
            warnings.warn(f"{folder} is another user's and is left alone", CkptWarning, stacklevel=2)
            return
        transaction = Transaction.load(folder, target)
        try:
            if transaction is not None:
                if transaction.is_committed():
                    transaction.finish()
                else:
                    transaction.undo()
                transaction.close()
        except OSError as error:
            raise StorageError(
                f"what an interrupted run has left could not be cleaned up: {error.strerror}",
                path=error.filename or target,
                hint=f"mend that and run again; the journal is {folder / _JOURNAL}",
            ) from error
        try:
            _twice(disk.remove, folder)
        except OSError as error:
            warnings.warn(f"{folder} could not be removed: {error.strerror}", CkptWarning, stacklevel=2)


def _twice(remove: Callable[[Path], None], path: Path) -> None:
    """Remove what is of no use any more; one failure is no reason to leave it lying about."""
    try:
        remove(path)
    except OSError:
        remove(path)


def _is_ours(folder: Path, target: Path) -> bool:
    """Tell whether a journal may be believed: in a folder that others may write into, anybody could leave one."""
    owners = {os.geteuid()}
    if target.exists():
        owners.add(target.stat().st_uid)
    return folder.stat().st_uid in owners


# --- a result in the making ---


@dataclass(frozen=True)
class Change:
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
class Staged:
    """A result in the making.

    Attributes:
        path: where to write it; for a file, nothing is there yet, for a directory, an empty one.
        target: where it goes.
        overwrite: whether a target that exists is replaced.
    """

    path: Path
    target: Path
    overwrite: bool

    def publish(
        self,
        change: Change | None = None,
        *,
        check: Callable[[], None] | None = None,
        watched: Mapping[str, Mark] | None = None,
        keep_old: bool = False,
    ) -> Path | None:
        """Flush it to disk and put it in its place: the commit.

        Args:
            change: of a target that exists, which of its files; all of it if not given.
            check: called when all is flushed; raises if what was read to make the result has changed meanwhile.
            watched: of a target that exists, what must not have changed meanwhile, as `survey` has found it.
            keep_old: leave the previous state beside the target.

        Returns:
            Where the previous state is kept.

        Raises:
            UsageError: the target has appeared meanwhile.
            ChangedError: something that is watched has changed; the target is as whoever changed it left it.
            StorageError: the file system refused; the target is as it was, or the message says that it is not.
        """
        folder = self.path.parent
        if os.path.lexists(self.target):
            if not self.overwrite:
                raise UsageError("has appeared meanwhile; nothing was written", path=self.target)
            transaction = Transaction(folder, self.target, change or Change(), keep_old, check, watched or {})
            transaction.run()
            return transaction.kept
        try:
            _flush(self.path, self.target)
            if check is not None:
                check()
            signals.check()
            with signals.put_off():
                disk.rename_new(self.path, self.target)
                committed.add(self.target)
                disk.fsync(self.target.parent)
        except FileExistsError:
            raise UsageError("has appeared meanwhile; nothing was written", path=self.target) from None
        return None


@contextmanager
def staged(target: Path, *, directory: bool, overwrite: bool) -> Iterator[Staged]:
    """Make a place to write a result to; at the end it is gone, whatever has become of the result."""
    folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}.stage")
    stage = Staged(folder / target.name, target, overwrite)
    try:
        disk.mkdir(folder)
        if directory:
            disk.mkdir(stage.path)
        yield stage
    except BaseException as error:
        named = _for_people(error, stage)
        _settle_after(error, folder, target)
        if named is error:
            raise
        raise named from error
    settle(folder, target)


def _for_people(error: BaseException, stage: Staged) -> BaseException:
    """Name the target instead of the place it is staged at, and say so if it has been written all the same."""
    if isinstance(error, OSError):
        error = StorageError.from_os_error(error, error.filename or stage.target)
    if isinstance(error, CkptError):
        if error.path is not None and error.path.is_relative_to(stage.path):
            error.path = stage.target / error.path.relative_to(stage.path)
        if stage.target in committed and isinstance(error, StorageError):
            error.message = f"{stage.target} was written, but then: {error.message}"
    return error


def _settle_after(error: BaseException, folder: Path, target: Path) -> None:
    """Clean up behind an error, which remains what is told."""
    if not folder.exists():
        return
    try:
        settle(folder, target)
    except (CkptError, OSError) as second:
        error.add_note(str(second))
        warnings.warn(f"{second}; the next run on it tries again", CkptWarning, stacklevel=3)


# --- the protocol ---


@dataclass
class Transaction:
    """A change of a target that exists, from the old state to the new one.

    Attributes:
        folder: its stage, which holds the new state, or the part of it that changes, under the target's name.
        target: a file or a directory.
        change: which of its files, and on which side of the commit.
        keep_old: leave the previous state beside the target, where that is exchanged as a whole.
        check: raises if something outside has changed that the new state was made from.
        watched: files of the target that must not change meanwhile.
        old: what is going to be replaced or removed.
        new: what takes its place.
        kept: where the previous state was left.
    """

    STEPS: ClassVar[tuple[str, ...]] = ("seal", "place", "verify", "commit", "look_again", "finish", "close")

    folder: Path
    target: Path
    change: Change
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
                    stack.enter_context(signals.put_off())
                getattr(self, step)()

    def seal(self) -> None:
        """Flush what is staged, and the journal, so that no power loss can take them away from here on."""
        for name in (self.change.pivot, *self.change.first, *self.change.later):
            self.new[name] = _expect(self._staged(name))
        for name in (*self.new, *self.change.removed):
            if (mark := mark_of(self._live(name))) is not None:
                self.old[name] = mark
        self._sealed = {self.change.pivot: self.new[self.change.pivot]}
        if self.change.pivot == ".":  # but for what the old state has linked in, too
            linked = {mark[0] for mark in self.watched.values()}
            self._sealed = {name: mark for name, mark in survey(self._staged(".")).items() if mark[0] not in linked}
        _flush(self._staged("."), self.target)
        journal = self.folder / _JOURNAL
        disk.write_new(journal, self._dump())
        disk.fsync(journal)
        disk.fsync(self.folder)
        disk.fsync(self.target.parent)

    def place(self) -> None:
        """Put in place what is not looked at yet."""
        for name in self.change.first:
            self._put(name)
        self._fsync_folders(self.change.first)

    def verify(self) -> None:
        """Refuse to go on if anybody has written meanwhile."""
        if self.check is not None:
            self.check()
        signals.check()
        for name, mark in self.watched.items():
            place = self._where_old(name)
            if place is not None and mark_of(place) != mark:
                raise ChangedError(
                    "changed meanwhile; nothing was written",
                    path=self._live(name),
                    hint="wait for the trainer to finish saving, then run again",
                )

    def commit(self) -> None:
        """Let the pivot and its successor change places."""
        staged, live = self._staged(self.change.pivot), self._live(self.change.pivot)
        try:
            disk.exchange(staged, live)
            committed.add(self.target)
        except disk.ExchangeUnavailableError as error:
            if live.is_dir() or self.keep_old:
                raise StorageError(
                    "this file system cannot exchange two names in one step",
                    path=self.target,
                    hint="use convert to a new path",
                ) from error
            disk.rename(staged, live)
            committed.add(self.target)
        disk.fsync(live.parent)

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
                disk.exchange(staged, live)
                committed.discard(self.target)
                disk.fsync(live.parent)
            else:  # they have written into the new state already, and go on: what they leave is theirs
                committed.discard(self.target)
                self.undo()
            raise

    def finish(self) -> None:
        """Put in place what is not looked at any more, and remove or keep what the old state has left."""
        if mark_of(self._live(self.change.pivot)) == self.new[self.change.pivot]:
            for name in self.change.later:
                if mark_of(self._live(name)) == self.old[name]:
                    self._replace(name)
            for name in self.change.removed:
                if mark_of(self._live(name)) == self.old[name]:
                    self._remove(name)
            self._fsync_folders((*self.change.later, *self.change.removed))
        if self.keep_old and self._staged(".").exists():
            self.kept = _rename_aside(self._staged("."), self.target)
            disk.fsync(self.target.parent)

    def close(self) -> None:
        """Remove the journal; one that a power loss brings back finds nothing more that is as it says."""
        disk.unlink(self.folder / _JOURNAL)

    def undo(self) -> None:
        """Take back what was placed; done twice, it is as done once."""
        for name in self.change.first:
            if mark_of(self._live(name)) != self.new[name]:
                continue
            if name in self.old:
                disk.rename(self._spare(name), self._live(name))
            else:
                disk.unlink(self._live(name))
        self._fsync_folders(self.change.first)

    def is_committed(self) -> bool:
        """Tell on which side of the commit it stands: the new pivot has left the stage."""
        mark = mark_of(self._staged(self.change.pivot))
        return mark is None or mark[0] != self.new[self.change.pivot][0]

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
            disk.rename_new(staged, live)
            return
        try:
            disk.exchange(staged, live)
        except disk.ExchangeUnavailableError:
            spare = staged.with_name(f"{staged.name}.old")
            disk.link_or_copy(live, spare)
            disk.fsync(spare)
            disk.fsync(spare.parent)
            disk.rename(staged, live)

    def _replace(self, name: str) -> None:
        """Put one file in place for good, unless what it was to replace is not what it was."""
        staged, live = self._staged(name), self._live(name)
        try:
            disk.exchange(staged, live)
        except disk.ExchangeUnavailableError:
            disk.rename(staged, live)
            return
        if mark_of(staged) != self.old[name]:
            disk.exchange(staged, live)

    def _remove(self, name: str) -> None:
        """Move one file into the stage, which will be removed; back if it is not what it was."""
        live, aside = self._live(name), self.folder / Path(name).name
        disk.rename_new(live, aside)
        if mark_of(aside) != self.old[name]:
            disk.rename_new(aside, live)

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
            disk.fsync(folder)

    # --- the journal ---

    def _dump(self) -> bytes:
        facts = {"change": asdict(self.change), "keep_old": self.keep_old, "old": self.old, "new": self.new}
        return json.dumps({"version": 1, **facts}, indent=2).encode()

    @classmethod
    def load(cls, folder: Path, target: Path) -> Transaction | None:
        """Return the transaction that a stage holds the journal of; None if it has none, or not a whole one.

        A journal is flushed before anything of the target is touched, so one that is not whole speaks of nothing.
        """
        try:
            facts = json.loads((folder / _JOURNAL).read_text(encoding="utf-8"))
            parts = facts["change"]
            change = Change(parts["pivot"], tuple(parts["first"]), tuple(parts["later"]), tuple(parts["removed"]))
            old, new = ({name: tuple(mark) for name, mark in facts[key].items()} for key in ("old", "new"))
            keep_old = bool(facts["keep_old"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in {*old, *new, *change.removed}):
            return None
        return cls(folder, target, change, keep_old, old=old, new=new)


def mark_of(path: Path | str) -> Mark | None:
    """Return what changes when a file is written or replaced; None where there is nothing."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        return (status.st_ino,)
    return status.st_ino, status.st_size, status.st_mtime_ns


def survey(target: Path) -> dict[str, Mark]:
    """Mark every file of a target by its path below it; of a target that is a file, ``.``."""
    if not target.is_dir():
        return {".": _expect(target)}
    found: dict[str, Mark] = {}
    for folder, _, names in os.walk(target):
        below = os.path.relpath(folder, target)
        for name in names:
            found[name if below == "." else f"{below}/{name}"] = _expect(f"{folder}/{name}")
    return found


def _expect(path: Path | str) -> Mark:
    mark = mark_of(path)
    if mark is None:
        raise FileNotFoundError(2, os.strerror(2), str(path))
    return mark


def _flush(path: Path, target: Path) -> None:
    """Give what is staged the mode bits and the owner of what it replaces, and flush it, files before folders.

    An fsync that failed is never tried again: the kernel may have dropped what it could not write.
    """
    for entry in (*_tree(path), path):
        old = target / entry.relative_to(path)
        if old.exists() and not old.samefile(entry) and old.is_dir() == entry.is_dir():
            disk.like(entry, old)
        if not entry.is_symlink():
            disk.fsync(entry)


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
            disk.rename_new(path, kept)
            return kept
    raise AssertionError("numbers do not end")
