"""Signals that end a run: raised where they arrive, put off where something must be done as a whole.

Imports nothing of torch.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []
_putting_off: list[None] = []  # one for each `put_off` that is under way


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
    """Let them do nothing any more: all is done, and the exit code is known."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)


def _raise(number: int, _: FrameType | None) -> None:
    _received.append(number)
    raise Interrupted(number)


def check() -> None:
    """Raise again what was lost: Python prints and drops an exception that is raised while it cleans up an object."""
    if _received and not _putting_off:
        raise Interrupted(_received[0])


@contextmanager
def put_off() -> Iterator[None]:
    """Put off signals to the end of a ``with`` block: what is in it is done, or fails, as a whole."""
    if threading.current_thread() is not threading.main_thread():  # where no signal is ever handled
        yield
        return
    caught: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)

    _putting_off.append(None)
    try:
        for number in _ENDING:
            if (handler := signal.getsignal(number)) is not None:  # None: not set by Python, nor to be set back by it
                before[number] = handler
                signal.signal(number, note)
        yield
    finally:
        _putting_off.pop()
        for number, usual in before.items():
            signal.signal(number, usual)
    if caught:
        signal.raise_signal(caught[0])
