"""Let Python's garbage collector run less often while many objects are made that are all kept."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_NEW_OBJECTS = 500_000


@contextmanager
def rare_collections() -> Iterator[None]:
    """Search for reference cycles only after 500,000 new objects, in a ``with`` block or as a decorator.

    A checkpoint of 4,096 experts has some hundred thousand objects. With Python's default of 700, the collector would
    look at all of them, and at those of torch, several times. Objects without cycles are freed at once, as always.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], _NEW_OBJECTS) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
