"""The machine: what it is, a file system that shares blocks, a core that is busy."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from benchmarks.measuring import memory_of_machine

RAM_DISK = Path("/dev/shm")
GIB = 2**30
# How to make a file system that shares blocks, the most common one first.
MAKERS = (("mkfs.xfs", "-q", "-f", "-m", "reflink=1"), ("mkfs.btrfs", "-q", "-f"))
# mkfs.xfs refuses smaller ones.
SMALLEST_IMAGE = 512 * 2**20


class NoFileSystemError(Exception):
    """This machine cannot provide a file system that shares blocks. The message says why."""


def describe(folder: Path) -> dict[str, str | int]:
    """Return what figures depend on: processor, cores, memory, kernel, versions, the file system of `folder`."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_of_machine() / GIB),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "file_system": file_system(folder),
    }


def in_words(machine: Mapping[str, str | int]) -> str:
    """Return the lines above the table that say where it was measured."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB\n"
        f"Linux {machine['kernel']}, Python {machine['python']}, torch {machine['torch']}, "
        f"on {machine['file_system']}"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def file_system(folder: Path) -> str:
    """Return the type of the file system that `folder` is on."""
    found = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted, kind, *_ = line.split()
        if folder.resolve().is_relative_to(mounted):
            found[len(mounted)] = kind  # of two at the same place, the later one hides the earlier one
    return found[max(found)]


def place_with_room(size: int) -> Path:
    """Return the RAM disk if `size` bytes and some more fit into it and into memory, else the temporary folder."""
    if RAM_DISK.is_dir():
        free = min(shutil.disk_usage(RAM_DISK).free, memory_of_machine("MemAvailable"))
        if free >= size + 2 * GIB:
            return RAM_DISK
    return Path(tempfile.gettempdir())


@contextmanager
def shared_blocks(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system that shares blocks, of `size` free bytes or more, from a sparse image in `folder`.

    Raises:
        NoFileSystemError: there is no program that makes one, or it cannot be mounted.
    """
    maker = next((each for each in MAKERS if shutil.which(each[0])), None)
    if maker is None:
        raise NoFileSystemError(f"none of {', '.join(each[0] for each in MAKERS)} is installed")
    image, mounted = folder / "image", folder / "mounted"
    mounted.mkdir()
    with image.open("xb") as file:
        file.truncate(max(SMALLEST_IMAGE, size + size // 8))
    try:
        _system(*maker, image)
        _system("mount", "-o", "loop", image, mounted)
        try:
            yield mounted
        finally:
            _system("umount", mounted)
    finally:
        image.unlink()
        mounted.rmdir()


def _system(*command: str | Path) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NoFileSystemError(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise NoFileSystemError(f"{command[0]} failed: {' '.join(error.stderr.split())}") from error


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep the last core busy."""
    last = max(os.sched_getaffinity(0))
    loop = f"import os; os.sched_setaffinity(0, [{last}])\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", loop])
    try:
        yield
    finally:
        process.kill()
        process.wait()
