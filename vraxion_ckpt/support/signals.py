"""Defer SIGINT, SIGTERM and SIGHUP during critical sections; otherwise raise them as exceptions.

An exception that can be raised between any two instructions makes reliable cleanup impossible: it may be raised between
the end of a ``with`` block and the start of its cleanup. So an operation that changes files runs in a `deferred` block
from its start to its end, and long steps that can be aborted run in an `interruptible` block inside it. Imports without
torch.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []


@dataclass(eq=False)
class _Block:
    """An active `deferred` block: the previous signal handlers, and the pending signals."""

    handlers: dict[int, Any] = field(default_factory=dict)
    pending: list[int] = field(default_factory=list)

    def defer(self, number: int, _: FrameType | None) -> None:
        self.pending.append(number)


_blocks: list[_Block] = []  # the innermost one is the last


class Interrupted(BaseException):
    """A signal, raised as an exception so that staged files are removed."""

    def __init__(self, number: int) -> None:
        self.number = number


def raise_on_signals() -> None:
    """Install handlers that raise `Interrupted` on SIGINT, SIGTERM and SIGHUP. Only the command line calls this."""
    _received.clear()
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # set by nohup, or by a shell for a background job
            signal.signal(number, _raise)
    sys.unraisablehook = _report


def _report(lost: sys.UnraisableHookArgs) -> None:
    """Report an exception that a finalizer lost, as Python does, but for a signal: `raise_pending` raises it again."""
    if not issubclass(lost.exc_type, Interrupted):
        sys.__unraisablehook__(lost)


def ignore_signals() -> None:
    """Ignore the signals that raise `Interrupted`. Called at the end, when the exit code is known."""
    for number in _ENDING:
        if signal.getsignal(number) is _raise:
            signal.signal(number, signal.SIG_IGN)


def _raise(number: int, _: FrameType | None) -> None:
    _received.append(number)
    raise Interrupted(number)


def raise_pending() -> None:
    """Raise `Interrupted` again if it was lost, because Python drops exceptions that are raised in a finalizer.

    Raises:
        Interrupted: a signal has arrived since `raise_on_signals`.
    """
    if _received:
        raise Interrupted(_received[0])


@contextmanager
def deferred() -> Iterator[None]:
    """Defer signals until the end of a ``with`` block, and deliver the first pending one there."""
    if not _is_main_thread():
        yield
        return
    block = _Block()
    _blocks.append(block)
    try:
        for number in _ENDING:
            if (handler := signal.getsignal(number)) is not None:  # None: not set by Python, so it cannot be restored
                block.handlers[number] = handler
                signal.signal(number, block.defer)
        yield
    finally:
        _blocks.remove(block)
        _install(block.handlers)
    if block.pending:
        signal.raise_signal(block.pending[0])


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside a `deferred` block, deliver pending signals and those that arrive during this ``with`` block."""
    if not _is_main_thread() or not _blocks:
        yield
        return
    block = _blocks[-1]
    deferring: dict[int, Any] = {number: signal.getsignal(number) for number in block.handlers}
    try:
        _install(block.handlers)
        while block.pending:
            signal.raise_signal(block.pending.pop(0))
        yield
    finally:
        if block in _blocks:  # false if a signal left this cleanup to the garbage collector
            _install(deferring)


def deliver_pending() -> None:
    """Deliver the pending signals of the innermost `deferred` block."""
    if _is_main_thread() and _blocks and _blocks[-1].pending:
        with interruptible():
            pass


def _is_main_thread() -> bool:
    """Tell whether this is the main thread: Python runs signal handlers only there."""
    return threading.current_thread() is threading.main_thread()


def _install(handlers: Mapping[int, Any]) -> None:
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    except BaseException:  # from a handler that was just installed; install the others too
        for number, handler in handlers.items():
            signal.signal(number, handler)
        raise
