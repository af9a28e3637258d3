"""Signals that end a run: raised where they arrive, but not where something must be done as a whole.

An exception that may come between any two instructions is no use to code that has to leave things tidy: it can come
after a ``with`` block has ended and before what that has to do begins. So an operation that changes files is a
`deferred` block from its beginning to its end, and what takes long in it, and can be given up, is `interruptible`.
Imports nothing of torch.
"""

from __future__ import annotations

import signal
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
    """A `deferred` block that is under way: what handled the signals before, and which have come."""

    usual: dict[int, Any] = field(default_factory=dict)
    caught: list[int] = field(default_factory=list)

    def note(self, number: int, _: FrameType | None) -> None:
        self.caught.append(number)


_blocks: list[_Block] = []  # the innermost last


class Interrupted(BaseException):
    """A signal, raised where it arrived, so that everything staged is removed on the way out."""

    def __init__(self, number: int) -> None:
        self.number = number


def raise_on_signals() -> None:
    """Let the signals that end a run raise `Interrupted`, from here on; for a program, not for a library."""
    _received.clear()
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup, or a shell for what runs behind it, wants it
            signal.signal(number, _raise)


def ignore_signals() -> None:
    """Let the signals that raise `Interrupted` do nothing any more: all is done, and the exit code is known."""
    for number in _ENDING:
        if signal.getsignal(number) is _raise:
            signal.signal(number, signal.SIG_IGN)


def _raise(number: int, _: FrameType | None) -> None:
    _received.append(number)
    raise Interrupted(number)


def raise_pending() -> None:
    """Raise again what was lost: Python prints and drops an exception that is raised while it cleans up an object."""
    if _received:
        raise Interrupted(_received[0])


@contextmanager
def deferred() -> Iterator[None]:
    """Put off signals to the end of a ``with`` block: what is in it is done, or fails, as a whole."""
    if not _signals_come():
        yield
        return
    block = _Block()
    _blocks.append(block)
    try:
        for number in _ENDING:
            if (handler := signal.getsignal(number)) is not None:  # None: not set by Python, nor to be set back by it
                block.usual[number] = handler
                signal.signal(number, block.note)
        yield
    finally:
        _blocks.remove(block)
        _handle(block.usual)
    if block.caught:
        signal.raise_signal(block.caught[0])


@contextmanager
def interruptible() -> Iterator[None]:
    """Let signals through again, in a stretch of the innermost `deferred`; first of all what has come before it."""
    if not _signals_come() or not _blocks:
        yield
        return
    block = _blocks[-1]
    outside: dict[int, Any] = {number: signal.getsignal(number) for number in block.usual}
    try:
        _handle(block.usual)
        while block.caught:
            signal.raise_signal(block.caught.pop(0))
        yield
    finally:
        if block in _blocks:  # a signal at the very end of the stretch may leave this to the garbage collector
            _handle(outside)


def deliver_pending() -> None:
    """Let the signals through that have come, in a `deferred` block."""
    if _signals_come() and _blocks and _blocks[-1].caught:
        with interruptible():
            pass


def _signals_come() -> bool:
    """Tell whether this is the thread in which signals are handled; the blocks are its own."""
    return threading.current_thread() is threading.main_thread()


def _handle(handlers: Mapping[int, Any]) -> None:
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    except BaseException:  # a signal, through the first of them; the others must not stay behind
        for number, handler in handlers.items():
            signal.signal(number, handler)
        raise
