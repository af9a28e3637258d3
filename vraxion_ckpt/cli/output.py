"""Print messages to standard error. Lines are wrapped on a terminal, but not in a log."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from vraxion_ckpt.printable import printable
from vraxion_ckpt.support import signals


def say(label: str, message: str, colour: str) -> None:
    """Print a message to standard error."""
    from rich.console import Console
    from rich.text import Text

    text = Text(f"{label}: ", style=f"bold {colour}") if label else Text()
    # A message that cannot be printed must not change the result or the exit code; rich exits on a closed pipe.
    with suppress(OSError, SystemExit):
        console = Console(stderr=True)
        # Without rich's wrapping, a terminal would break lines within words. A log keeps lines whole.
        console.print(text + Text(printable(message)), soft_wrap=not console.is_terminal)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning unless ``--quiet`` is given."""
    context = click.get_current_context(silent=True)
    if not (context and context.find_root().params.get("quiet")):
        say("warning", str(message), "yellow")


def drop_output() -> None:
    """Redirect standard output to the null device, so that flushing it at exit cannot fail."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def unless_too_late(*targets: str) -> Iterator[None]:
    """Exit with 0 and a warning if a signal arrives when all targets are already committed.

    The block must end with `signals.ignore_signals`, because a later signal would be reported as an interruption.
    """
    try:
        yield
    except signals.Interrupted:
        from vraxion_ckpt.commit.transaction import committed

        if not targets or not all(Path(os.path.realpath(target)) in committed for target in targets):
            raise
        signals.ignore_signals()
        say("warning", f"the signal came too late: {', '.join(targets)} was written", "yellow")
        raise click.exceptions.Exit(0) from None
