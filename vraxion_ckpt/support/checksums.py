"""CRC-32 checksums, as zip archives have them, computed on all cores. Imports without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from vraxion_ckpt.support.file_bytes import read_at

try:  # three to five times as fast as zlib
    from isal.isal_zlib import crc32 as crc32
except ImportError:  # no wheel for this machine
    from zlib import crc32 as crc32

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
THREADS = min(4, _CORES or 1)
_PIECE = 2**18  # bytes; fits into the CPU's cache
_POLYNOMIAL = 0xEDB88320  # of CRC-32, with the highest power in the lowest bit
_ONE = 1 << 31  # the polynomial 1


def checksums_of_ranges(descriptor: int, ranges: Sequence[tuple[int, int]], path: Path) -> list[int]:
    """Return the CRC-32 of ranges of an open file, each given by its offset and its number of bytes."""
    from concurrent.futures import ThreadPoolExecutor

    def of_range(place: tuple[int, int]) -> int:
        start, size = place
        crc = 0
        for at in range(start, start + size, _PIECE):
            crc = crc32(read_at(descriptor, at, min(_PIECE, start + size - at), path), crc)
        return crc

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(of_range, ranges))


def crc32_combined(first: int, second: int, size: int) -> int:
    """Return the CRC-32 of two adjacent runs of bytes from their CRC-32s. The second run has `size` bytes.

    See ``crc32_combine`` in https://github.com/madler/zlib/blob/master/crc32.c.
    """
    return _product(_power(size), first) ^ second


@cache
def _power(size: int) -> int:
    """Return x to the power of the number of bits in `size` bytes, modulo the polynomial."""
    result, square = _ONE, _ONE >> 8
    while size:
        if size & 1:
            result = _product(square, result)
        square = _product(square, square)
        size >>= 1
    return result


def _product(a: int, b: int) -> int:
    """Return the product of two polynomials modulo the polynomial of CRC-32."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return result
