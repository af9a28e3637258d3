"""Signs of progress on standard error, for whoever is waiting at a terminal for more than a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Set by the commands; a library is silent.
wanted = False
_shown: list[str] = []


@contextmanager
def progress_bar(what: str, total: int, unit: str = "B") -> Iterator[Callable[[int], object]]:
    """Show how many of `total` bytes, or other units, are done; the function that is given counts them.

    Nothing is shown off a terminal, or before a second has passed, or within another bar; nothing stays afterwards.
    """
    if not wanted or _shown:
        yield lambda _: None
        return
    from tqdm import tqdm

    _shown.append(what)
    try:
        with tqdm(
            desc=what,
            total=total,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            unit_divisor=1024,
            delay=1,
            leave=False,
            disable=None,
            ascii=" =",
        ) as shown:
            yield shown.update
    finally:
        _shown.pop()
