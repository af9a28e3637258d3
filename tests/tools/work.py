"""Measure work as a multiple of a fixed piece of work, independent of load and of the machine's speed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

# Reading any file of the tests takes a few units at most.
MOST = 150


@dataclass
class Work:
    """The measured work of a block of code."""

    units: float = 0


@cache
def _unit() -> float:
    """Return the processor time of one unit of work."""

    def once() -> float:
        start = time.process_time()
        sum(i * i for i in range(500_000))
        return time.process_time() - start

    return min(once() for _ in range(3))


@contextmanager
def measured() -> Iterator[Work]:
    """Measure the processor time of this process in a block."""
    work, unit, start = Work(), _unit(), time.process_time()
    try:
        yield work
    finally:
        work.units = (time.process_time() - start) / unit


@contextmanager
def bounded(most: float = MOST) -> Iterator[None]:
    """Fail if a block takes more than the given units of work."""
    with measured() as work:
        yield
    assert work.units < most
