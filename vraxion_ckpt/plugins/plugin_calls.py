"""Run plugin code with its output redirected to standard error and its exceptions converted to `PluginError`.

This package calls plugin code only within `plugin_call`. This module does not import torch.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from typing import Any, TextIO

from vraxion_ckpt.errors import CkptError, CkptWarning, PluginError, is_out_of_memory, raise_if_out_of_memory
from vraxion_ckpt.support import signals

_STDOUT, _STDERR = 1, 2
_FIRST_FREE = 10  # the lowest descriptor for copies, because a closed standard descriptor would be reused

_libc = ctypes.CDLL(None)

_distributions: dict[type, str] = {}
_observers: list[Callable[[str, str], object]] = []


@contextmanager
def plugin_call(name: str, distribution: str | Callable[[], str]) -> Iterator[None]:
    """Run a plugin's code in a ``with`` block.

    `CkptError`, `OSError`, interruptions and out-of-memory errors propagate.

    Args:
        name: the plugin's name, for the error message.
        distribution: the distribution of the plugin, or a function that returns it.

    Raises:
        PluginError: the code raised any other exception, including ``SystemExit``.
        OutOfMemoryError: the code ran out of memory.
    """
    with output_to_stderr():
        try:
            yield
        except BaseException as error:
            raise_if_out_of_memory(error)
            if isinstance(error, CkptError | OSError) or not is_fault_of_plugin(error):
                raise
            raise defect(in_words(error), name, distribution) from error
        finally:
            for observe in _observers:
                observe(name, distribution if isinstance(distribution, str) else distribution())


def defect(message: str, name: str, distribution: str | Callable[[], str]) -> PluginError:
    """Return a `PluginError` that names a plugin and its distribution."""
    home = distribution if isinstance(distribution, str) else distribution()
    return PluginError(message, key=name, hint=f"this is a defect of {home}")


def is_fault_of_plugin(error: BaseException) -> bool:
    """Return whether an exception is a plugin's fault.

    Interruptions, out-of-memory errors and a `CkptWarning` that Python raises as an error are not.
    """
    passes = isinstance(error, KeyboardInterrupt | signals.Interrupted | CkptWarning)
    return not passes and not is_out_of_memory(error)


def in_words(error: BaseException) -> str:
    """Return the class and the text of an exception, or only the class if its ``__str__`` fails."""
    try:
        text = str(error)
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    except Exception:
        return type(error).__name__


@contextmanager
def observed(observe: Callable[[str, str], object]) -> Iterator[None]:
    """Within a ``with`` block, call `observe` with the plugin's name and distribution after each plugin call."""
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


# --- distributions ---


def note_distribution(plugin: type, distribution: str) -> None:
    """Record which distribution registered a class."""
    _distributions[plugin] = distribution


def distribution_of(plugin: type) -> str:
    """Return the distribution of a class, or its top-level module if the distribution is unknown."""
    if plugin in _distributions:
        return _distributions[plugin]
    home = plugin.__module__.partition(".")[0]
    names = metadata.packages_distributions().get(home, [])
    return names[0] if names else home


# --- output ---

_lock = threading.Lock()
_thread = threading.local()
_depth = 0
_usual: Any = None  # sys.stdout before the outermost active call
_restore: Callable[[], None] | None = None


@contextmanager
def output_to_stderr() -> Iterator[None]:
    """Redirect the standard output of Python, C code and child processes to standard error in a ``with`` block.

    Blocks may be nested and may run in several threads: the first to start redirects, the last to end restores. The
    redirection affects the whole process, including threads outside the block.
    """
    if getattr(_thread, "redirected", False):
        yield
        return
    with signals.deferred():  # a signal must not interrupt a redirection halfway
        _begin()
        _thread.redirected = True
        try:
            with signals.interruptible():
                yield
        finally:
            _thread.redirected = False
            _end()


def _begin() -> None:
    global _depth, _usual, _restore
    with _lock:
        _depth += 1
        if _depth == 1:
            _usual = sys.stdout
            _restore = _redirect_descriptor() if _flush(_usual) else None
            sys.stdout = sys.stderr if sys.stderr is not None else _null_stream()


def _end() -> None:
    global _depth, _usual, _restore
    with _lock:
        _depth -= 1
        if _depth == 0:
            _flush(_usual)  # a plugin may hold a reference to the original stream
            if _restore is not None:
                _restore()
            sys.stdout, _usual, _restore = _usual, None, None


def _flush(stream: Any) -> bool:
    """Flush a stream and C's buffers. Return False on failure, so that the stream's owner sees the error later."""
    with suppress(AttributeError, OSError):
        _libc.fflush(None)
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        return False
    except (AttributeError, ValueError):  # not a real stream, or closed
        return True
    return True


def _redirect_descriptor() -> Callable[[], None] | None:
    """Make descriptor 1 a copy of descriptor 2 or of the null device. Return a function that restores descriptor 1."""
    with suppress(OSError):  # without a free descriptor, only Python's output is redirected
        target = _error_descriptor()
        try:
            return _replace_stdout(target)
        finally:
            if target != _STDERR:
                os.close(target)
    return None


@cache
def _null_stream() -> TextIO:
    """Return a stream for a process without standard error. It is never closed, because a plugin may keep it."""
    return os.fdopen(_null_descriptor(), "w")


def _error_descriptor() -> int:
    """Return descriptor 2, or the null device if descriptor 2 was closed at start and may now be any file."""
    if sys.__stderr__ is not None:
        with suppress(OSError):
            os.fstat(_STDERR)
            return _STDERR
    return _null_descriptor()


def _null_descriptor() -> int:
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        return fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
    finally:
        os.close(null)


def _replace_stdout(target: int) -> Callable[[], None] | None:
    try:
        saved = fcntl.fcntl(_STDOUT, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        # Descriptor 1 is closed. Occupy it, or the next file to be opened would receive the output.
        if (taken := fcntl.fcntl(target, fcntl.F_DUPFD, _STDOUT)) != _STDOUT:
            os.close(taken)
            return None
        return lambda: os.close(_STDOUT)
    os.dup2(target, _STDOUT)

    def restore() -> None:
        os.dup2(saved, _STDOUT)
        os.close(saved)

    return restore
