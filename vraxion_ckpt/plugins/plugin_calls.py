"""Run the code of plugins: what it prints goes to standard error, and what it raises becomes a `PluginError`.

Every call of a plugin's code by this package is made within `plugin_call`. Imports nothing of torch.
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
_FIRST_FREE = 10  # copies of descriptors are kept away from the standard ones, which may be closed

_libc = ctypes.CDLL(None)

_distributions: dict[type, str] = {}
_observers: list[Callable[[str, str], object]] = []


@contextmanager
def plugin_call(name: str, distribution: str | Callable[[], str]) -> Iterator[None]:
    """Run a plugin's code in a ``with`` block.

    Errors of ours and of the operating system pass, as do interruptions and a lack of memory.

    Args:
        name: the plugin's name, for the error.
        distribution: the distribution it comes from, or a function that finds it, called only for an error.

    Raises:
        PluginError: for whatever else is raised, ``SystemExit`` and other exits included.
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
    """Return the error for what a plugin did wrong."""
    home = distribution if isinstance(distribution, str) else distribution()
    return PluginError(message, key=name, hint=f"this is a defect of {home}")


def is_fault_of_plugin(error: BaseException) -> bool:
    """Tell whether a plugin is to blame: not for an interruption, a lack of memory, or a warning made an error."""
    passes = isinstance(error, KeyboardInterrupt | signals.Interrupted | CkptWarning)
    return not passes and not is_out_of_memory(error)


def in_words(error: BaseException) -> str:
    """Return the class of an exception and its text, even if its own code for that fails."""
    try:
        text = str(error)
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    except Exception:
        return type(error).__name__


@contextmanager
def observed(observe: Callable[[str, str], object]) -> Iterator[None]:
    """Call a function with the name and the distribution of each plugin whose call ends, in a ``with`` block."""
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


# --- where a plugin comes from ---


def note_distribution(plugin: type, distribution: str) -> None:
    """Remember which distribution registered a class."""
    _distributions[plugin] = distribution


def distribution_of(plugin: type) -> str:
    """Return the distribution of a class, or its top-level module where none is known."""
    if plugin in _distributions:
        return _distributions[plugin]
    home = plugin.__module__.partition(".")[0]
    names = metadata.packages_distributions().get(home, [])
    return names[0] if names else home


# --- output ---

_lock = threading.Lock()
_thread = threading.local()
_depth = 0
_usual: Any = None  # sys.stdout before the first of the calls that are under way
_restore: Callable[[], None] | None = None


@contextmanager
def output_to_stderr() -> Iterator[None]:
    """Redirect standard output to standard error in a ``with`` block: of Python, of C code, of child processes.

    Calls may be nested and come from several threads: the first redirects, the last one restores. Standard output
    belongs to the process, so output of other threads is redirected meanwhile, too.
    """
    if getattr(_thread, "redirected", False):
        yield
        return
    with signals.deferred():  # a signal must not come between the two halves of a redirection
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
            _flush(_usual)  # a plugin may have kept the stream from before
            if _restore is not None:
                _restore()
            sys.stdout, _usual, _restore = _usual, None, None


def _flush(stream: Any) -> bool:
    """Write what is buffered to the descriptor; return False if that fails, so that its owner sees the error later."""
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
    """Make descriptor 1 a copy of descriptor 2, or of the null device; return what undoes that."""
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
    """Return a stream for a process without standard error; it stays open, for a plugin may keep it."""
    return os.fdopen(_null_descriptor(), "w")


def _error_descriptor() -> int:
    """Return descriptor 2; where it was closed from the start, it may be any file by now, so the null device."""
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
        # It is closed: hold its place, or the next file to be opened would get what is printed.
        if (taken := fcntl.fcntl(target, fcntl.F_DUPFD, _STDOUT)) != _STDOUT:
            os.close(taken)
            return None
        return lambda: os.close(_STDOUT)
    os.dup2(target, _STDOUT)

    def restore() -> None:
        os.dup2(saved, _STDOUT)
        os.close(saved)

    return restore
