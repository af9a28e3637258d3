"""Stage a result beside its target, then commit it. The target always has either its old state or its new one.

The result is written to ``.<name>.<txid>.stage/<name>``. A new target is renamed into place; an existing one is changed
by a `vraxion_ckpt.commit.transaction`. A lock lets only one run at a time work on a target. Each run first rolls back
or finishes the changes of killed runs. Imports without torch.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.commit.durability import flush
from vraxion_ckpt.commit.file_marks import Mark
from vraxion_ckpt.commit.journal import JOURNAL, FileChanges
from vraxion_ckpt.commit.transaction import Transaction, committed
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

if TYPE_CHECKING:
    from filelock import FileLock


def check_target(target: Path, *, overwrite: bool) -> None:
    """Check, before anything is read, that a target may be written.

    Raises:
        UsageError: the target exists and `overwrite` is false, or its folder is missing or not writable.
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
    """Lock a target during a ``with`` block, and first roll back or finish the changes of killed runs.

    The lock is a file beside the target, because the commit may replace a directory. It is removed at the end.

    Raises:
        BusyError: another run holds the lock.
        StorageError: the file system refused or does not support locks, or a killed run cannot be recovered.
    """
    from filelock import FileLock

    place = target.with_name(f".{target.name}.vraxion-ckpt.lock")
    # Other users must be able to open a lock file that a killed run has left.
    lock = FileLock(place, mode=0o666, fallback_to_soft=False, is_singleton=False, thread_local=False)
    held = False
    try:
        with signals.deferred():
            _acquire(lock, place, target)
            held = True
        for folder in leftovers(target):
            if folder.stat().st_uid != os.geteuid():  # another user's journal is not trusted
                warnings.warn(f"{folder} belongs to another user and is left alone", CkptWarning, stacklevel=3)
            elif outcome := recover(folder, target):
                message = f"{target}: an interrupted edit was {outcome}"
                warnings.warn(message, CkptWarning, stacklevel=3)
        yield
    finally:
        if held:
            with signals.deferred():
                with suppress(OSError):
                    _twice(system_calls.unlink, place)  # before the release, so that a waiting run notices
                lock.release()


def _acquire(lock: FileLock, place: Path, target: Path) -> None:
    """Take the lock without waiting. Try three times, because the holder may just be removing the lock file."""
    from filelock import Timeout

    existed = os.path.lexists(place)
    for last in (False, False, True):
        try:
            lock.acquire(blocking=False)
            return
        except Timeout:
            if last:
                _check_can_make_files(target)  # filelock reports a held lock if no file can be made
                hint = "wait for it to end; if none is running on this machine, one on another may be"
                raise BusyError("another run is at work on it", path=target, hint=hint) from None
        except Exception as error:  # filelock raises several classes where the file system has no locks
            if not existed:
                with suppress(OSError):
                    system_calls.unlink(place)
            raise _not_lockable(error, target) from error


def _check_can_make_files(target: Path) -> None:
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _not_lockable(error, target) from error


def _not_lockable(error: Exception, target: Path) -> StorageError:
    if is_out_of_memory(error):
        return OutOfMemoryError(path=target)
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    hint = "write to a file system that supports file locks, such as the one of your home folder"
    return StorageError(f"the lock file beside it cannot be locked: {reason}", path=target, hint=hint)


def leftovers(target: Path) -> list[Path]:
    """List the staging folders beside a target, including those that killed processes left."""
    staged = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.stage")
    try:
        with os.scandir(target.parent) as entries:
            names = [e.name for e in entries if staged.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise StorageError.from_os_error(error, target.parent) from error
    return [target.with_name(name) for name in sorted(names)]


def was_interrupted(target: Path) -> bool:
    """Tell whether there is a journal beside a target, so that a change of the target is unfinished."""
    try:
        return any((folder / JOURNAL).exists() for folder in leftovers(target))
    except StorageError:
        return False


def recover(folder: Path, target: Path) -> str | None:
    """Roll back or forward from the journal in a stage, then remove the stage.

    Returns:
        what was done, such as ``rolled back``; None if there was no journal.

    Raises:
        StorageError: the journal cannot be followed, or the file system refused; the stage is kept.
    """
    with signals.deferred():
        outcome = None
        transaction = Transaction.load(folder, target)
        try:
            if transaction is not None:
                if transaction.is_committed():
                    transaction.finish()
                    saved = "left as it is, because the checkpoint has been saved since"
                    outcome = "finished" if transaction.is_in_place() else saved
                else:
                    transaction.undo()
                    outcome = "rolled back"
                transaction.close()
        except OSError as error:
            message = f"an interrupted edit could not be rolled back or finished: {error.strerror}"
            hint = f"remove the cause and run again; the journal is {folder / JOURNAL}"
            raise StorageError(message, path=error.filename or target, hint=hint) from error
        try:
            _twice(system_calls.remove, folder)
        except OSError as error:
            warnings.warn(f"{folder} could not be removed: {error.strerror}", CkptWarning, stacklevel=2)
    return outcome


def _twice(remove: Callable[[Path], None], path: Path) -> None:
    """Remove a file or folder; try a second time if that fails."""
    try:
        remove(path)
    except OSError:
        remove(path)


# --- staged results ---


@dataclass
class Staged:
    """A result that is written beside its target, and then committed.

    Attributes:
        path: where to write the result: an empty directory, or the name of a file that does not exist yet.
        target: the path to commit it to.
        overwrite: whether an existing target is replaced.
        change: which files of an existing target change; by default, the whole target is exchanged.
    """

    path: Path
    target: Path
    overwrite: bool
    change: FileChanges = field(default_factory=FileChanges)

    def prepare(self) -> None:
        """Flush the result to disk. If there are several results, prepare all before the first is published.

        Raises:
            UsageError: the target was created by another process.
            OSError: the file system refused.
        """
        if os.path.lexists(self.target) and not self.overwrite:
            raise self._created_by_another()
        flush(self.path, self.target, folders=self.change.exchanged == ".")

    def publish(
        self,
        *,
        check: Callable[[], None] | None = None,
        watched: Mapping[str, Mark] | None = None,
        keep_old: bool = False,
    ) -> Path | None:
        """Flush the result to disk and commit it.

        Args:
            check: a function that is called after the flush. It raises if a source of the result has changed.
            watched: the marks, as of `survey`, of the files of an existing target that must not have changed.
            keep_old: whether to keep the old state of an existing target beside it.

        Returns:
            the path of the old state; None if it is not kept.

        Raises:
            UsageError: the target was created by another process.
            ChangedError: a watched file has changed; the target is as the other process left it.
            StorageError: the target cannot be changed in place.
            OSError: the file system refused.
        """
        folder = self.path.parent
        if os.path.lexists(self.target):
            if not self.overwrite:
                raise self._created_by_another()
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
            raise self._created_by_another() from None
        return None

    def _created_by_another(self) -> UsageError:
        return UsageError("was created by another process", path=self.target, written=())


@contextmanager
def staged(target: Path, *, directory: bool, overwrite: bool, change: FileChanges | None = None) -> Iterator[Staged]:
    """Make a stage for a result, and remove the stage at the end of the ``with`` block.

    Args:
        target: the path of the result.
        directory: whether the result is a directory.
        overwrite: see `Staged`.
        change: see `Staged`.

    Raises:
        CkptError: an error of the block; its path names the target instead of the stage.
        StorageError: the file system refused.
    """
    folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}.stage")
    stage = Staged(folder / target.name, target, overwrite, change or FileChanges())
    committed.discard(target)
    try:
        system_calls.mkdir(folder, 0o700)  # staged files do not have the mode bits of the target's files yet
        if directory:
            system_calls.mkdir(stage.path)
        yield stage
    except BaseException as error:
        named = _naming_target(error, stage)
        _recover_after(named, folder, target)
        if named is error:
            raise
        raise named from (error.__cause__ if isinstance(error, CkptError) else error)
    recover(folder, target)


def _naming_target(error: BaseException, stage: Staged) -> BaseException:
    """Return an error that names the target instead of the stage, and says if the target was written nevertheless."""
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


def _recover_after(error: BaseException, folder: Path, target: Path) -> None:
    """Recover the target after an error. An error of the recovery becomes a warning and a note on the first error."""
    if not folder.exists():
        return
    try:
        recover(folder, target)
    except (CkptError, OSError) as second:
        error.add_note(str(second))
        warnings.warn(f"{second}; the next run on this target tries again", CkptWarning, stacklevel=3)
