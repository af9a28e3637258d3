"""Progress bars on standard error, for operations that take more than a second at a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# Set by the commands; a library is silent.
wanted = False
_shown: list[str] = []
_DELAY = 1.0  # seconds before a bar appears
_INTERVAL = 0.1  # seconds between two drawings


@contextmanager
def progress_bar(what: str, total: int, unit: str = "B") -> Iterator[Callable[[int], object]]:
    """Show how many of `total` bytes, or other units, are done; call the yielded function to count them.

    Nothing is shown off a terminal, within another bar, or before `_DELAY`. The bar is erased at the end.
    """
    if not wanted or _shown or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    # Hidden, the cursor would stay hidden after a process that is killed.
    console.show_cursor = lambda *_: False  # type: ignore[method-assign]
    counted = TextColumn("{task.completed}/{task.total} " + unit)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True) if unit == "B" else counted,
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,  # no thread; `count` draws
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
            with suppress(OSError, SystemExit):  # the terminal may be gone, on which rich exits
                progress.start()
                progress.refresh()

    _shown.append(what)
    try:
        yield count
    finally:
        _shown.pop()
        with suppress(OSError, SystemExit):
            progress.stop()
