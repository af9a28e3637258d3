"""Put a finished result in its place: the old state or the new one, never a mix.

What is to come is staged beside its target, as ``.<name>.<txid>.stage/<name>``. A new target is renamed into place; one
that exists is changed in a `vraxion_ckpt.commit.transaction`. One run at a time works on a target, and
first brings to an end what dead ones have left. Imports nothing of torch.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.commit.transaction import JOURNAL, FileChanges, Mark, Transaction, committed, flush
from vraxion_ckpt.errors import (
    BusyError,
    CkptError,
    CkptWarning,
    OutOfMemoryError,
    StorageError,
    UsageError,
    is_out_of_memory,
)
from vraxion_ckpt.support import signals


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that cannot, or must not, be written; called before anything is read.

    Raises:
        UsageError: it exists and `overwrite` is false, or its folder is missing or not writable.
        StorageError: its file system is read-only.
    """
    if target.exists() and not overwrite:
        hint = "choose a new name, or, where the command has it, pass --overwrite to replace it"
        raise UsageError("exists already", path=target, hint=hint)
    folder = target.parent
    if not folder.is_dir():
        nearest = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
        if os.path.lexists(nearest) and not nearest.is_dir():
            raise UsageError("is not a folder to write into", path=nearest, hint="choose another path")
        raise UsageError(
            "there is no such folder to write into", path=folder, hint=f"create it: mkdir -p {shlex.quote(str(folder))}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            raise StorageError("the file system is read-only", path=target)
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
    # Whoever comes after a run that was killed must be able to open the file that it has left.
    lock = FileLock(place, mode=0o666, fallback_to_soft=False, is_singleton=False, thread_local=False)
    held = False
    try:
        with signals.deferred():
            _acquire(lock, place, target)
            held = True
        for folder in leftovers(target):
            if folder.stat().st_uid != os.geteuid():  # anybody could leave a journal where others may write
                warnings.warn(f"{folder} is another user's and is left alone", CkptWarning, stacklevel=3)
            elif how := settle(folder, target):
                message = f"{target}: an edit that was interrupted has been {how}"
                warnings.warn(message, CkptWarning, stacklevel=3)
        yield
    finally:
        if held:
            with signals.deferred():
                with suppress(OSError):
                    _twice(system_calls.unlink, place)  # before the release: who has it open then sees that it is gone
                lock.release()


def _acquire(lock: FileLock, place: Path, target: Path) -> None:
    """Take the lock at once, or not at all; a holder that has just removed its file is no reason to give up."""
    there = os.path.lexists(place)
    for last in (False, False, True):
        try:
            lock.acquire(blocking=False)
            return
        except Timeout:
            if last:
                _check_takes_files(target)  # filelock cannot tell a folder that takes none from a holder
                hint = "wait for it to end; if none is running on this machine, one on another may be"
                raise BusyError("another run is at work on it", path=target, hint=hint) from None
        except Exception as error:  # a file system without locks: filelock has more than one class of error for that
            if not there:
                with suppress(OSError):
                    system_calls.unlink(place)
            raise _not_lockable(error, target) from error


def _check_takes_files(target: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _not_lockable(error, target) from error


def _not_lockable(error: Exception, target: Path) -> StorageError:
    if is_out_of_memory(error):
        return OutOfMemoryError(path=target)
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    hint = "write to a file system that takes files and locks, such as that of your home folder"
    return StorageError(f"it cannot be locked by a file beside it: {reason}", path=target, hint=hint)


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
        return any((folder / JOURNAL).exists() for folder in leftovers(target))
    except StorageError:
        return False


def settle(folder: Path, target: Path) -> str | None:
    """Bring a stage to an end, whoever has left it: take back or finish what its journal says, and remove it.

    Returns:
        What has become of it; None if there was no journal.

    Raises:
        StorageError: the target could be brought neither to the old state nor to the new one.
    """
    with signals.deferred():
        how = None
        transaction = Transaction.load(folder, target)
        try:
            if transaction is not None:
                if transaction.is_committed():
                    transaction.finish()
                    how = "finished" if transaction.is_in_place() else "left as it is, for it has been saved since"
                else:
                    transaction.undo()
                    how = "taken back"
                transaction.close()
        except OSError as error:
            raise StorageError(
                f"what an interrupted run has left could not be cleaned up: {error.strerror}",
                path=error.filename or target,
                hint=f"mend that and run again; the journal is {folder / JOURNAL}",
            ) from error
        try:
            _twice(system_calls.remove, folder)
        except OSError as error:
            warnings.warn(f"{folder} could not be removed: {error.strerror}", CkptWarning, stacklevel=2)
    return how


def _twice(remove: Callable[[Path], None], path: Path) -> None:
    """Remove what is of no use any more; one failure is no reason to leave it lying about."""
    try:
        remove(path)
    except OSError:
        remove(path)


# --- a result in the making ---


@dataclass
class Staged:
    """A result in the making.

    Attributes:
        path: where to write it; for a file, nothing is there yet, for a directory, an empty one.
        target: where it goes.
        overwrite: whether a target that exists is replaced.
        change: of a target that exists, which of its files; all of it if not given.
    """

    path: Path
    target: Path
    overwrite: bool
    change: FileChanges = field(default_factory=FileChanges)

    def prepare(self) -> None:
        """Flush it to disk, and refuse a target that has appeared: of several, all that can fail early."""
        if os.path.lexists(self.target) and not self.overwrite:
            raise UsageError("has appeared meanwhile", path=self.target, written=())
        flush(self.path, self.target, folders=self.change.pivot == ".")

    def publish(
        self,
        *,
        check: Callable[[], None] | None = None,
        watched: Mapping[str, Mark] | None = None,
        keep_old: bool = False,
    ) -> Path | None:
        """Flush it to disk and put it in its place: the commit.

        Args:
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
                raise UsageError("has appeared meanwhile", path=self.target, written=())
            transaction = Transaction(folder, self.target, self.change, keep_old, check, watched or {})
            transaction.run()
            return transaction.kept
        try:
            with signals.interruptible():
                flush(self.path, self.target)
            if check is not None:
                check()
            signals.raise_pending()
            with signals.deferred():
                system_calls.rename_new(self.path, self.target)
                committed.add(self.target)
                system_calls.fsync(self.target.parent)
        except FileExistsError:
            raise UsageError("has appeared meanwhile", path=self.target, written=()) from None
        return None


@contextmanager
def staged(target: Path, *, directory: bool, overwrite: bool, change: FileChanges | None = None) -> Iterator[Staged]:
    """Make a place to write a result to; at the end it is gone, whatever has become of the result."""
    folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}.stage")
    stage = Staged(folder / target.name, target, overwrite, change or FileChanges())
    committed.discard(target)
    try:
        system_calls.mkdir(folder, 0o700)  # what is in it may be meant for fewer eyes than its mode bits say yet
        if directory:
            system_calls.mkdir(stage.path)
        yield stage
    except BaseException as error:
        named = _for_people(error, stage)
        _settle_after(named, folder, target)
        if named is error:
            raise
        raise named from (error.__cause__ if isinstance(error, CkptError) else error)
    settle(folder, target)


def _for_people(error: BaseException, stage: Staged) -> BaseException:
    """Name the target instead of the place it is staged at, and say so if it has been written all the same."""
    if is_out_of_memory(error):
        error = OutOfMemoryError(path=stage.target)
    elif isinstance(error, OSError):
        error = StorageError.from_os_error(error, error.filename or stage.target)
    if isinstance(error, CkptError):
        if error.path is not None and error.path.is_relative_to(stage.path):
            error = error.with_facts(path=stage.target / error.path.relative_to(stage.path))
        if stage.target in committed and isinstance(error, StorageError):
            error = error.with_facts(written=tuple(dict.fromkeys([*(error.written or ()), stage.target])))
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
