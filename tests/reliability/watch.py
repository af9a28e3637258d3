"""Observe the effects of a run: files it opens, code it runs, time and memory it takes, files it changes."""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import struct
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Snapshot = Mapping[str, tuple[object, ...]]

SECONDS = 5
MEMORY = 256 * 2**20  # and twice the input

_IN_OPEN, _IN_ISDIR = 0x20, 0x40000000
_EVENT = struct.Struct("iIII")
# Audit events when a process is started, or a class is looked up by an unpickler other than this package's or torch's.
_RUNS = {
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"),
    *("subprocess.Popen", "pickle.find_class"),
}


@dataclass
class Seen:
    """The observed effects of a run.

    Attributes:
        opened: all files that Python opened, and those in the folder of the checkpoint that any library opened.
        ran: the processes started, and the classes looked up for a pickle.
        seconds: processor time.
        memory: the peak memory in bytes, minus the memory before.
    """

    opened: list[Path] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    seconds: float = 0
    memory: int = 0


_now: Seen | None = None


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if _now is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        _now.opened.append(Path(os.fsdecode(arguments[0])))
    elif event in _RUNS:
        _now.ran.append(f"{event} {arguments}")


@cache
def _listen() -> None:
    """Install the audit hook, once, because it cannot be removed."""
    sys.addaudithook(_hear)


@contextmanager
def watched(folder: Path) -> Iterator[Seen]:
    """Watch a run on a checkpoint in `folder`; fail if it does not end."""
    global _now
    _listen()
    seen = Seen()
    with _opened_in(folder, seen), _alarm():
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak memory
        before, start = _peak(), time.process_time()
        _now = seen
        try:
            yield seen
        finally:
            _now = None
            seen.seconds, seen.memory = time.process_time() - start, _peak() - before


@contextmanager
def _opened_in(folder: Path, seen: Seen) -> Iterator[None]:
    """Record the files directly in a folder that are opened, also by libraries outside of Python."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert watch >= 0
    assert libc.inotify_add_watch(watch, os.fsencode(folder), _IN_OPEN) >= 0
    try:
        yield
        seen.opened += [folder / name for name in _events(watch)]
    finally:
        os.close(watch)


def _events(watch: int) -> Iterator[str]:
    while True:
        try:
            events = os.read(watch, 2**16)
        except BlockingIOError:
            return
        while events:
            _, mask, _, length = _EVENT.unpack_from(events)
            name = events[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
            events = events[_EVENT.size + length :]
            if name and not mask & _IN_ISDIR:
                yield os.fsdecode(name)


@contextmanager
def _alarm() -> Iterator[None]:
    """Fail a run that reads without end or waits for a FIFO."""

    def stop(*_: object) -> None:
        raise AssertionError("still reading")  # a class that no reader catches

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def size(path: Path) -> int:
    """Return the disk space of a checkpoint, without the holes of sparse files."""
    return sum(entry.lstat().st_blocks * 512 for entry in [path, *path.rglob("*")])


def snapshot(folder: Path, locked: Collection[Path]) -> Snapshot:
    """Return the names, kinds, modes, times and contents of everything in a folder.

    The state of the folders in `locked` is left out, because lock files are made in them.
    """
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): () if path in locked else _state(path) for path in found}


def _state(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    content: object = None
    if stat.S_ISLNK(status.st_mode):
        content = path.readlink()
    elif stat.S_ISREG(status.st_mode) and status.st_size < 2**30:  # larger files are sparse
        content = path.read_bytes()
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, content
