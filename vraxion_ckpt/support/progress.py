"""Progress bars on standard error, for operations that take more than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# The commands set this; the library itself shows no progress.
wanted = False
_shown: list[str] = []
_DELAY = 1.0  # seconds before a bar appears
_INTERVAL = 0.1  # seconds between two drawings


@contextmanager
def progress_bar(what: str, total: int, unit: str = "B") -> Iterator[Callable[[int], object]]:
    """Show progress during a ``with`` block. Call the yielded function with the number of bytes or units just done.

    The bar appears after `_DELAY`, if standard error is a terminal and no other bar is shown. It is erased at the end.

    Args:
        what: the label.
        total: the total number of bytes or units.
        unit: the name of the unit; ``B`` for bytes.
    """
    if not wanted or _shown or sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    # rich hides the cursor, and a killed process could not show it again.
    console.show_cursor = lambda *_: False  # type: ignore[method-assign]
    counted = TextColumn("{task.completed}/{task.total} " + unit)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True) if unit == "B" else counted,
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,  # no extra thread: `count` draws
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_interactive,  # TERM=dumb
    )
    task = progress.add_task(what, total=total)
    due = time.monotonic() + _DELAY

    def count(done: int) -> None:
        nonlocal due
        progress.advance(task, done)
        if time.monotonic() >= due:
            due = time.monotonic() + _INTERVAL
            with suppress(OSError, SystemExit):  # rich exits if the terminal is gone
                progress.start()
                progress.refresh()

    _shown.append(what)
    try:
        yield count
    finally:
        _shown.pop()
        with suppress(OSError, SystemExit):
            progress.stop()
