"""What a run does beside what it says: files it opens, code it runs, time and memory it takes, what it changes."""

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
# What Python tells when it starts a process, or unpickles with anything but a reader of ours or torch's safe one.
_RUNS = {
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"),
    *("subprocess.Popen", "pickle.find_class"),
}


@dataclass
class Seen:
    """What was seen of a run.

    Attributes:
        opened: every file that Python opened, and every one beside the checkpoint, whoever opened it.
        ran: processes started, and classes looked up for a pickle.
        seconds: of processor time.
        memory: the most that it took at a time, in bytes.
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
    """Hook into Python, once: there is no way back."""
    sys.addaudithook(_hear)


@contextmanager
def watched(folder: Path) -> Iterator[Seen]:
    """Watch a run on a checkpoint in `folder`; one that does not come to an end fails."""
    global _now
    _listen()
    seen = Seen()
    with _opened_in(folder, seen), _alarm():
        Path("/proc/self/clear_refs").write_text("5")  # forget the most memory so far
        before, start = _peak(), time.process_time()
        _now = seen
        try:
            yield seen
        finally:
            _now = None
            seen.seconds, seen.memory = time.process_time() - start, _peak() - before


@contextmanager
def _opened_in(folder: Path, seen: Seen) -> Iterator[None]:
    """Note the files right in a folder that are opened, by libraries too, of which Python hears nothing."""
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
    """Fail what reads on and on, or waits at a FIFO."""

    def stop(*_: object) -> None:
        raise AssertionError("still reading")  # which no reader takes for an error of the file

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
    """Return what a checkpoint takes on the disk, which of a file with holes is little."""
    return sum(entry.lstat().st_blocks * 512 for entry in [path, *path.rglob("*")])


def snapshot(folder: Path, locked: Collection[Path]) -> Snapshot:
    """Return all that there is below a folder: names, kinds, modes, times, contents.

    In the folders that are `locked`, lock files may have come and gone.
    """
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): () if path in locked else _state(path) for path in found}


def _state(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    content: object = None
    if stat.S_ISLNK(status.st_mode):
        content = path.readlink()
    elif stat.S_ISREG(status.st_mode) and status.st_size < 2**30:  # larger ones are holes
        content = path.read_bytes()
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, content
