"""Measure time, anonymous memory and bytes read and written, in processes of their own.

Each ratio is taken from alternating repeats (ours, the other, ours, the other, …), because machines are noisy. A work
that is measured is a function of this package, which `in_child` runs in a new process. Before a measurement, that
process does the same work on a tiny checkpoint, so that imports and the search for plugins are not measured.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MIB = 2**20
Found = dict[str, list[float]]


class BenchmarkError(Exception):
    """A measured operation failed, or its result is wrong."""


@dataclass(frozen=True)
class Watched:
    """What one run of a work cost.

    Attributes:
        seconds: wall-clock time.
        peak: largest anonymous memory of the process, in bytes.
    """

    seconds: float
    peak: int


def anonymous_bytes() -> int:
    """Return the current anonymous memory of this process in bytes. Pages of mapped files do not count."""
    return 1024 * _number("/proc/self/status", "RssAnon:")


def bytes_read_and_written() -> tuple[int, int]:
    """Return how many bytes this process has read and written by system calls, copies in the kernel included."""
    return _number("/proc/self/io", "rchar:"), _number("/proc/self/io", "wchar:")


def memory_of_machine(key: str = "MemTotal") -> int:
    """Return a size that ``/proc/meminfo`` states, in bytes."""
    return 1024 * _number("/proc/meminfo", f"{key}:")


def address_space() -> int:
    """Return the size of this process's address space in bytes, which `RLIMIT_AS` limits."""
    return 1024 * _number("/proc/self/status", "VmSize:")


def _number(file: str, key: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise BenchmarkError(f"{file} has no {key}")


def timed(work: Callable[[], object]) -> float:
    """Return the duration of `work` in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def watched(work: Callable[[], object]) -> Watched:
    """Run `work`. Another thread samples the anonymous memory every few milliseconds."""
    peak, done = anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.004):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        seconds = timed(work)
    finally:  # else the thread would keep a failed process alive
        done.set()
        watcher.join()
    return Watched(seconds, max(peak, anonymous_bytes()))


def find_memory(size: int) -> None:
    """Allocate `size` bytes, touch every page and free them. The host of a virtual machine then provides them."""
    if size:
        with mmap.mmap(-1, size) as memory:
            for at in range(0, size, mmap.PAGESIZE):
                memory[at] = 1


def bytes_below(path: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes. Holes count."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def scratch(*paths: Path) -> Iterator[None]:
    """Remove `paths` at the end, if they exist."""
    try:
        yield
    finally:
        for path in paths:
            if path.exists():
                remove(path)


def run(*command: str | Path, code: int = 0) -> None:
    """Run a command. Raise BenchmarkError if its exit code is not `code`."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # installed packages have bytecode, too
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode != code:
        raise BenchmarkError(f"{command} ended with {done.returncode}: {done.stderr}")


def in_child(work: str, **arguments: object) -> Any:
    """Return the result of a function of this package, run in a new process. Paths arrive there as strings.

    Args:
        work: the function, as ``module.function`` below this package. Its module may import torch.
        arguments: its keyword arguments, as JSON values or paths.

    Raises:
        BenchmarkError: the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.measuring", work, json.dumps(arguments, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise BenchmarkError(f"{work} failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(name: str, arguments: str) -> None:
    module, _, function = name.rpartition(".")
    work = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    print("\n" + json.dumps(work(**json.loads(arguments))))


if __name__ == "__main__":
    _child(*sys.argv[1:])
