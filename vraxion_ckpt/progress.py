"""Signs of progress on standard error, for whoever is waiting at a terminal for more than a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Set by the commands; a library is silent.
wanted = False


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show how many of `total` bytes are done; the function that is given counts them.

    Nothing is shown off a terminal, or before a second has passed; nothing stays afterwards.
    """
    if not wanted:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(
        desc=what,
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=1,
        leave=False,
        disable=None,
        ascii=" =",
    ) as shown:
        yield shown.update
