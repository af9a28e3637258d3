"""Copy bytes into an open file on all cores, and read each piece back while it is in the cache.

Bytes of files go through a small buffer, unless they have the same offset in a block of the source and of the target.
Then ``copy_file_range`` copies them, because file systems such as XFS and Btrfs let both files share such blocks.
Where no block can be shared, it takes a fifth more time than the buffer, which stays in the cache of the CPU.
Imports without torch.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from vraxion_ckpt.support import signals
from vraxion_ckpt.support.checksums import THREADS, crc32, crc32_combined
from vraxion_ckpt.support.file_bytes import read_at, read_into, write_at

PIECE = 2**18  # bytes that are copied and read back at a time; they fit into the CPU's cache
BLOCK = 2**12  # bytes; two files can share blocks of this size, on file systems that support it
_STRIPE = 2**20  # bytes for which a thread computes one checksum
_MOST_TOGETHER = 256  # small copies for which a thread is woken once
_CLONE_RANGE = 0x4020940D  # FICLONERANGE of Linux, see ioctl_ficlonerange(2)
_SMALL = 2**16  # bytes of a copy that is not cut, and that is copied together with its neighbours
_LONGEST_WAIT = 0.05  # seconds until signals are delivered


@dataclass(frozen=True)
class OpenFile:
    """A file descriptor, and the path for messages."""

    descriptor: int
    path: Path


@dataclass(eq=False)
class Copy:
    """A run of bytes to be copied into the target.

    Attributes:
        source: a file, or bytes in memory.
        start: offset of the first byte in `source`.
        nbytes: number of bytes.
        target_start: offset of the first byte in the target.
        sums_source: whether to compute `source_crc`.
        crc: the CRC-32 of the bytes that were read back from the target.
        source_crc: the CRC-32 of the bytes of the source. They are read a second time for this.
    """

    source: OpenFile | memoryview
    start: int
    nbytes: int
    target_start: int
    sums_source: bool
    crc: int = 0
    source_crc: int = 0


@dataclass(eq=False)
class _Stripe:
    """A part of a copy, and its checksums."""

    copy: Copy
    first: int
    nbytes: int
    crc: int = 0
    source_crc: int = 0


@dataclass(eq=False)
class _Run:
    """The state that the threads share."""

    target: OpenFile
    waiting: deque[list[_Stripe]]
    stopped: bool = False
    copied: list[int] = field(default_factory=lambda: [0] * THREADS)  # bytes, by thread


def copy_all(copies: Sequence[Copy], target: OpenFile, advance: Callable[[int], object]) -> None:
    """Copy runs of bytes into an open file, and set their checksums.

    Pending signals are delivered between pieces. After an error, no thread begins another piece. What lies between
    small copies in the target may be overwritten with zeros.

    Args:
        copies: the runs, in the order of their offsets in the target.
        target: the file, open for reading and writing.
        advance: called with the number of bytes copied since the last call.

    Raises:
        CorruptError: a source ends before.
        StorageError: the operating system cannot read a source, or write the target or read it back.
    """
    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

    stripes = [stripe for copy in copies for stripe in _stripes(copy)]
    run = _Run(target, deque(_bundles(stripes)))
    threads = min(THREADS, len(run.waiting))
    if threads > 1:
        with ThreadPoolExecutor(threads - 1) as pool:
            try:
                others = {pool.submit(_work, run, number, None) for number in range(1, threads)}
                _work(run, 0, advance)
                while others:
                    signals.deliver_pending()
                    ended, others = wait(others, _LONGEST_WAIT, FIRST_COMPLETED)
                    for other in ended:
                        other.result()
            except BaseException:
                run.stopped = True
                raise
    else:
        _work(run, 0, advance)
    for stripe in stripes:
        copy = stripe.copy
        copy.crc = crc32_combined(copy.crc, stripe.crc, stripe.nbytes) if stripe.first else stripe.crc
        if copy.sums_source:
            found = stripe.source_crc
            copy.source_crc = crc32_combined(copy.source_crc, found, stripe.nbytes) if stripe.first else found


def _stripes(copy: Copy) -> Iterator[_Stripe]:
    """Cut a copy at multiples of `_STRIPE` in the target, where blocks begin that file systems can share."""
    if copy.nbytes <= _SMALL:
        yield _Stripe(copy, 0, copy.nbytes)
        return
    end = copy.target_start + copy.nbytes
    cuts = range(copy.target_start // _STRIPE * _STRIPE + _STRIPE, end, _STRIPE)
    for start, stop in pairwise([copy.target_start, *cuts, end]):
        yield _Stripe(copy, start - copy.target_start, stop - start)


def _bundles(stripes: Sequence[_Stripe]) -> Iterator[list[_Stripe]]:
    bundle: list[_Stripe] = []
    size = 0
    for stripe in stripes:
        bundle.append(stripe)
        size += stripe.nbytes
        if size >= _STRIPE or len(bundle) == _MOST_TOGETHER:
            yield bundle
            bundle, size = [], 0
    if bundle:
        yield bundle


def _neighbours(bundle: Sequence[_Stripe]) -> Iterator[list[_Stripe]]:
    """Yield the stripes of a bundle: small ones together that are near each other in their source and in the target."""
    near: list[_Stripe] = []
    for stripe in bundle:
        if near and not _is_near(stripe.copy, near[0].copy):
            yield near
            near = []
        near.append(stripe)
    yield near


def _is_near(copy: Copy, first: Copy) -> bool:
    """Return whether two copies are small, and the second begins and ends in the `PIECE` bytes from the first on."""
    return (
        copy.source is first.source
        and max(first.nbytes, copy.nbytes) <= _SMALL
        and first.start <= copy.start <= first.start + PIECE - copy.nbytes
        and copy.target_start <= first.target_start + PIECE - copy.nbytes
    )


def _work(run: _Run, number: int, advance: Callable[[int], object] | None) -> None:
    """Copy stripes until none is waiting. The main thread shows the progress and delivers signals."""
    buffer = memoryview(bytearray(PIECE))
    shown = 0
    try:
        while True:
            try:
                bundle = run.waiting.popleft()
            except IndexError:
                return
            for near in _neighbours(bundle):
                for piece in _pieces(near[0]) if len(near) == 1 else [None]:
                    if run.stopped:
                        return
                    if advance is not None:
                        signals.deliver_pending()
                    if piece is not None:
                        _copy_piece(near[0], *piece, run.target, buffer)
                    else:
                        _copy_together(near, run.target, buffer)
                run.copied[number] += sum(stripe.nbytes for stripe in near)
            if advance is not None:
                copied = sum(run.copied)
                advance(copied - shown)
                shown = copied
    except BaseException:
        run.stopped = True
        raise


def _pieces(stripe: _Stripe) -> Iterator[tuple[int, int]]:
    """Yield the offset and the size of each piece. Pieces end at multiples of `PIECE` in the target."""
    first, end = stripe.first, stripe.first + stripe.nbytes
    while first < end:
        size = min(PIECE - (stripe.copy.target_start + first) % PIECE, end - first)
        yield first, size
        first += size


def _copy_together(near: list[_Stripe], target: OpenFile, buffer: memoryview) -> None:
    """Copy neighbours with one call of the operating system for each step.

    What lies between them in the target is overwritten with zeros.
    """
    copies = [stripe.copy for stripe in near]
    source, start, target_start = copies[0].source, copies[0].start, copies[0].target_start
    size = max(copy.start + copy.nbytes for copy in copies) - start
    content = _read(source, start, size)
    together = memoryview(bytearray(copies[-1].target_start + copies[-1].nbytes - target_start))
    for copy in copies:
        at, to = copy.start - start, copy.target_start - target_start
        together[to : to + copy.nbytes] = content[at : at + copy.nbytes]
    write_at(target.descriptor, target_start, together, target.path)
    found = buffer[: len(together)]
    read_into(target.descriptor, target_start, found, target.path)
    again = _read(source, start, size) if any(copy.sums_source for copy in copies) else content[:0]
    for stripe, copy in zip(near, copies, strict=True):
        at, to = copy.start - start, copy.target_start - target_start
        stripe.crc = crc32(found[to : to + copy.nbytes])
        if copy.sums_source:
            stripe.source_crc = crc32(again[at : at + copy.nbytes])


def _read(source: OpenFile | memoryview, start: int, size: int) -> memoryview:
    if isinstance(source, memoryview):
        return source[start : start + size]
    return memoryview(read_at(source.descriptor, start, size, source.path))


def _copy_piece(stripe: _Stripe, first: int, size: int, target: OpenFile, buffer: memoryview) -> None:
    copy = stripe.copy
    source, start, target_start = copy.source, copy.start + first, copy.target_start + first
    piece = buffer[:size]
    if isinstance(source, memoryview):
        write_at(target.descriptor, target_start, source[start : start + size], target.path)
    else:
        copy_range(source, start, target, target_start, piece)
    read_into(target.descriptor, target_start, piece, target.path)
    stripe.crc = crc32(piece, stripe.crc)
    if not copy.sums_source:
        return
    if isinstance(source, memoryview):
        stripe.source_crc = crc32(source[start : start + size], stripe.source_crc)
    else:
        read_into(source.descriptor, start, piece, source.path)
        stripe.source_crc = crc32(piece, stripe.source_crc)


def copy_range(source: OpenFile, start: int, target: OpenFile, target_start: int, buffer: memoryview) -> None:
    """Copy as many bytes from file to file as the buffer has. Its content is undefined afterwards.

    Raises:
        CorruptError: the source ends before.
        StorageError: the operating system cannot read the source, or write the target.
    """
    size, done = len(buffer), 0
    if (start - target_start) % BLOCK == 0:
        try:
            while done < size:
                more = os.copy_file_range(
                    source.descriptor, target.descriptor, size - done, start + done, target_start + done
                )
                if not more:
                    break
                done += more
        except (OSError, AttributeError):
            # Some file systems, some pairs of them and macOS do not have it. If it failed for another reason, the calls
            # below fail, too, and tell which file it is.
            pass
    if done < size:
        read_into(source.descriptor, start + done, buffer[done:], source.path)
        write_at(target.descriptor, target_start + done, buffer[done:], target.path)


def can_share_blocks(source: OpenFile, target: OpenFile) -> bool:
    """Tell whether the file system lets two files share blocks. The target must be empty, and is empty afterwards."""
    try:
        fcntl.ioctl(target.descriptor, _CLONE_RANGE, struct.pack("=q3Q", source.descriptor, 0, BLOCK, 0))
    except OSError:
        return False
    os.ftruncate(target.descriptor, 0)
    return True
