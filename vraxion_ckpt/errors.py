"""The errors of this package, and the exit code of each.

::

    CkptError                     1
    ├── UsageError                2   the call is wrong; nothing was read or written
    │   └── OptionError           2   an option of a plugin is unknown or of the wrong type
    ├── SourceError                   the checkpoint that was read is invalid
    │   ├── UnknownFormatError    3   no adapter, or more than one, recognises it
    │   ├── CorruptError          4   damaged: truncated, flipped bits, contradicting headers
    │   ├── UnsafeError           5   loading it would run code that it contains
    │   ├── UnsupportedError      6   valid, but of a kind that is not supported
    │   ├── LimitError            7   reading it would need too much memory or time
    │   └── InconsistentError     8   readable, but its parts contradict each other
    ├── BindingError              9   optimizer ids cannot be bound to parameter names
    ├── TransformError           10   a transform cannot be applied to this checkpoint
    ├── InvariantError           11   a chain produced an invalid checkpoint
    ├── LossError                12   the target format cannot hold everything in the checkpoint
    ├── ChangedError             13   a source file changed while it was being read
    ├── StorageError             14   the file system refused: no space, no permission, an I/O error
    ├── PluginError              15   a plugin is broken, missing, or conflicts with another
    └── BusyError                16   another run is working on the same target

``CkptError`` itself is never raised. Commands exit with ``1`` if they did their work and the answer is "no".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from vraxion_ckpt.printable import in_one_line

# Messages of torch, C++, the C library and the dynamic linker when memory runs out, in lower case.
_OUT_OF_MEMORY = (
    "not enough memory",
    "cannot allocate memory",
    "can't allocate memory",
    "out of memory",
    "std::bad_alloc",
    "failed to map segment from shared object",
    "can't start new thread",  # there is no memory for its stack
)


class CkptError(Exception):
    """Base class of all errors of this package: what is wrong, where, and what to do.

    Errors are not modified. `with_facts` returns a changed copy.

    Attributes:
        message: what is wrong, without `path` and `key`.
        path: the file or directory that the error is about, if any.
        key: the entry in the file, such as a tensor name or a path in the payload, if any.
        hint: what the user can do, if anything.
        written: the targets that were written before the error; empty if there are none, None if unknown.
        not_written: the targets that were not written.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        key: str | None = None,
        hint: str | None = None,
        written: Sequence[str | os.PathLike[str]] | None = None,
        not_written: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        self.message = message
        self.path = Path(path) if path is not None else None
        self.key = key
        self.hint = hint
        self.written = written
        self.not_written = not_written
        super().__init__(message)

    @property
    def where(self) -> str:
        """The path and the key, on one line; empty if there is neither."""
        where = " ".join(part for part in (str(self.path or ""), f"[{self.key}]" if self.key else "") if part)
        return in_one_line(where)  # so that a file name cannot imitate a message

    def with_facts(self, **facts: Any) -> Self:
        """Return a copy of the error, traceback included, with some attributes replaced."""
        error = type(self).__new__(type(self), facts.get("message", self.message))
        vars(error).update(vars(self) | facts)
        return error.with_traceback(self.__traceback__)

    def __str__(self) -> str:
        targets = [f"{path} was written" for path in self.written or ()]
        targets += [f"{path} was not" for path in self.not_written]
        if self.written is not None and not self.written:
            targets = ["nothing was written"]
        text = "; ".join([self.message, *([", ".join(targets)] if targets else [])])
        text = f"{self.where}: {text}" if self.where else text
        return f"{text}\n  → {self.hint}" if self.hint else text


class UsageError(CkptError):
    """The call is wrong; nothing was read or written."""

    exit_code = 2


class OptionError(UsageError):
    """An option of a plugin is unknown, missing or of the wrong type."""


class SourceError(CkptError):
    """The checkpoint that was read is invalid."""


class UnknownFormatError(SourceError):
    """No adapter, or more than one, recognises the source."""

    exit_code = 3


class CorruptError(SourceError):
    """The source is damaged: truncated, flipped bits, contradicting headers."""

    exit_code = 4


class UnsafeError(SourceError):
    """Loading the source would run code that it contains."""

    exit_code = 5


class UnsupportedError(SourceError):
    """The source is valid, but of a kind that is not supported."""

    exit_code = 6


class LimitError(SourceError):
    """Reading the source would need too much memory or time."""

    exit_code = 7


class InconsistentError(SourceError):
    """The source is readable, but its parts contradict each other."""

    exit_code = 8


class BindingError(CkptError):
    """Optimizer ids cannot be bound to parameter names without guessing."""

    exit_code = 9


class TransformError(CkptError):
    """A transform cannot be applied to this checkpoint."""

    exit_code = 10


class InvariantError(CkptError):
    """A chain produced an invalid checkpoint."""

    exit_code = 11


class LossError(CkptError):
    """The target format cannot hold everything in the checkpoint."""

    exit_code = 12


class ChangedError(CkptError):
    """A source file changed while it was being read."""

    exit_code = 13


class StorageError(CkptError):
    """The file system refused: no space, no permission, an I/O error."""

    exit_code = 14

    @classmethod
    def from_os_error(cls, error: OSError, path: str | os.PathLike[str]) -> StorageError:
        """Return an error about `path` with the reason that an `OSError` states; `OutOfMemoryError` for ENOMEM."""
        if is_out_of_memory(error):
            return OutOfMemoryError(path=path)
        return cls(error.strerror or str(error), path=path)


class OutOfMemoryError(StorageError):
    """Python, numpy, torch or the operating system reported that there is not enough memory."""

    def __init__(self, *, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__("not enough memory", path=path, hint="run it where more memory is free")


class PluginError(CkptError):
    """A plugin is broken, missing, or conflicts with another."""

    exit_code = 15


class BusyError(CkptError):
    """Another run is working on the same target."""

    exit_code = 16


class CkptWarning(UserWarning):
    """A problem that does not stop the operation."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception, or the one that caused it, means that memory ran out."""
    if isinstance(error, OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    if isinstance(error, CkptError) or not isinstance(error, Exception):
        return False
    text = ""
    if isinstance(error, RuntimeError | OSError | ImportError):  # other messages may quote text from a checkpoint
        text = str(error).lower()
    cause = error.__cause__ or error.__context__
    return any(words in text for words in _OUT_OF_MEMORY) or (cause is not None and is_out_of_memory(cause))


def raise_if_out_of_memory(error: BaseException, path: str | os.PathLike[str] | None = None) -> None:
    """Raise `OutOfMemoryError` if an exception means that memory ran out; otherwise return.

    Call it first in a handler that catches every exception and raises another one.

    Raises:
        OutOfMemoryError: `error` means that memory ran out.
    """
    if is_out_of_memory(error):
        raise OutOfMemoryError(path=path) from error


@contextmanager
def errors_at(path: str | os.PathLike[str] | None = None, *, key: str | None = None) -> Iterator[None]:
    """Give a `CkptError` of a ``with`` block `path` if it has no path; else `key` if it has neither path nor key."""
    try:
        yield
    except CkptError as error:
        if path is not None and error.path is None:
            raise error.with_facts(path=Path(path)) from error.__cause__
        if key is not None and not error.where:
            raise error.with_facts(key=key) from error.__cause__
        raise


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise `OutOfMemoryError` if memory runs out in a ``with`` block, or in the decorated function."""
    try:
        yield
    except Exception as error:
        raise_if_out_of_memory(error)
        raise
