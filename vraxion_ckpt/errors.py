"""Every error that this package raises on purpose, and the exit code of each.

::

    CkptError                     1
    ├── UsageError                2   the call itself is wrong; nothing was read or written
    │   └── OptionError           2   an option of a plugin is unknown or of the wrong type
    ├── SourceError                   the checkpoint that was read is at fault
    │   ├── UnknownFormatError    3   no adapter, or more than one, recognises it
    │   ├── CorruptError          4   damaged: truncated, flipped bits, contradicting headers
    │   ├── UnsafeError           5   loading it would run code that it contains
    │   ├── UnsupportedError      6   sound, but of a kind that is not handled
    │   ├── LimitError            7   made, or damaged, so that reading it would exhaust the machine
    │   └── InconsistentError     8   readable, but its parts contradict each other
    ├── BindingError              9   optimizer ids cannot be bound to parameter names
    ├── TransformError           10   a transform refuses this checkpoint
    ├── InvariantError           11   a chain produced something that must not be written
    ├── LossError                12   the target format cannot hold everything
    ├── ChangedError             13   a source file changed while it was being read
    ├── StorageError             14   the file system refused: no space, no permission, an I/O error
    ├── PluginError              15   a plugin is broken, missing, or clashes with another
    └── BusyError                16   another run is at work on the same target

``CkptError`` itself is never raised; ``1`` is kept for commands whose answer is "no".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from vraxion_ckpt.printable import in_one_line

# What torch, C++, the C library and the dynamic linker say when memory runs out, in lower case.
_OUT_OF_MEMORY = (
    "not enough memory",
    "cannot allocate memory",
    "can't allocate memory",
    "out of memory",
    "std::bad_alloc",
    "failed to map segment from shared object",
    "can't start new thread",  # whose stack is memory
)


class CkptError(Exception):
    """Base of every error of ours: what is wrong, where, and what to do.

    An error is not changed after it was built; `with_facts` returns another.

    Attributes:
        message: what is wrong, without the place.
        path: the file or directory at fault, if one is.
        key: the entry inside it (a tensor name, a payload path), if one is.
        hint: what the user can do about it, if there is something.
        written: the targets that are in place all the same; empty if none is, None if the error does not say.
        not_written: the targets that are not, where some are.
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
        """The path and the entry at fault, on one line; empty if neither is known."""
        where = " ".join(part for part in (str(self.path or ""), f"[{self.key}]" if self.key else "") if part)
        return in_one_line(where)  # or a name could look like a message of ours

    def with_facts(self, **facts: Any) -> Self:
        """Return an error like this one, raised at the same place, with some of its attributes replaced."""
        error = type(self).__new__(type(self), facts.get("message", self.message))
        vars(error).update(vars(self) | facts)
        return error.with_traceback(self.__traceback__)

    def __str__(self) -> str:
        told = [f"{path} was written" for path in self.written or ()]
        told += [f"{path} was not" for path in self.not_written]
        if self.written is not None and not self.written:
            told = ["nothing was written"]
        text = "; ".join([self.message, *([", ".join(told)] if told else [])])
        text = f"{self.where}: {text}" if self.where else text
        return f"{text}\n  → {self.hint}" if self.hint else text


class UsageError(CkptError):
    """The call itself is wrong; nothing was read or written."""

    exit_code = 2


class OptionError(UsageError):
    """An option of a plugin is unknown, missing or of the wrong type."""


class SourceError(CkptError):
    """The checkpoint that was read is at fault."""


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
    """The source is sound, but of a kind that is not handled."""

    exit_code = 6


class LimitError(SourceError):
    """Reading the source would exhaust the machine."""

    exit_code = 7


class InconsistentError(SourceError):
    """The source is readable, but its parts contradict each other."""

    exit_code = 8


class BindingError(CkptError):
    """Optimizer ids cannot be bound to parameter names without guessing."""

    exit_code = 9


class TransformError(CkptError):
    """A transform refuses this checkpoint."""

    exit_code = 10


class InvariantError(CkptError):
    """A chain produced a checkpoint that must not be written."""

    exit_code = 11


class LossError(CkptError):
    """The target format cannot hold everything the checkpoint has."""

    exit_code = 12


class ChangedError(CkptError):
    """A source file changed while it was being read."""

    exit_code = 13


class StorageError(CkptError):
    """The file system refused: no space, no permission, an I/O error."""

    exit_code = 14

    @classmethod
    def from_os_error(cls, error: OSError, path: str | os.PathLike[str]) -> StorageError:
        """Wrap an operating-system error, keeping its reason and naming the path we were working on."""
        if is_out_of_memory(error):
            return OutOfMemoryError(path=path)
        return cls(error.strerror or str(error), path=path)


class OutOfMemoryError(StorageError):
    """There was not enough memory, as noticed by Python, numpy, torch or the operating system."""

    def __init__(self, *, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__("not enough memory", path=path, hint="run it where more memory is free")


class PluginError(CkptError):
    """A plugin is broken, missing, or clashes with another."""

    exit_code = 15


class BusyError(CkptError):
    """Another run is at work on the same target."""

    exit_code = 16


class CkptWarning(UserWarning):
    """Something the user should know that does not stop the work."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory ran out, in its own words or as the cause it was raised from."""
    if isinstance(error, OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    if isinstance(error, CkptError) or not isinstance(error, Exception):
        return False
    text = ""
    if isinstance(error, RuntimeError | OSError | ImportError):  # the text of another may quote a checkpoint
        text = str(error).lower()
    cause = error.__cause__ or error.__context__
    return any(words in text for words in _OUT_OF_MEMORY) or (cause is not None and is_out_of_memory(cause))


def raise_if_out_of_memory(error: BaseException, path: str | os.PathLike[str] | None = None) -> None:
    """Raise `OutOfMemoryError` in place of an exception that says so; return for any other.

    Call it first wherever an exception of any class is turned into an error of another kind.
    """
    if is_out_of_memory(error):
        raise OutOfMemoryError(path=path) from error


@contextmanager
def errors_at(path: str | os.PathLike[str] | None = None, *, key: str | None = None) -> Iterator[None]:
    """Name a path in errors of ours that a ``with`` block raises and that name none; a key in those without a place."""
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
    """Raise `OutOfMemoryError` for an exception that says so; also a decorator, for the functions that users call."""
    try:
        yield
    except Exception as error:
        raise_if_out_of_memory(error)
        raise
