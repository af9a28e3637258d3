"""How facts look on a terminal: labelled lines, sizes, the ring as a band of colours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import groupby

import click
import numpy as np
from pydantic import ByteSize
from rich.console import Console, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from vraxion_ckpt.checkpoint.ring import Ints

Line = tuple[str, str | Text]

MOST_ROWS = 16
_OWNER_SIGNS = "0123456789abcdefghijklmnopqrstuvwxyz"
# Colours of the 256-colour palette that black text can be read on.
_OWNER_COLOURS = (75, 215, 114, 211, 180, 147, 80, 221, 174, 151, 117, 218)


def console() -> Console:
    """Return the console for data; no colours off a terminal, or with NO_COLOR."""
    return Console(highlight=False)


def byte_size(number: int) -> str:
    """Return a number of bytes for people."""
    return ByteSize(number).human_readable(separator=" ")


def band(owners: Ints, width: int) -> Text:
    """Draw a ring as one line: a cell for each address, or for each equal share of them, the commonest owner's sign."""
    shown = [Counter(cell.tolist()).most_common(1)[0][0] for cell in np.array_split(owners, min(width, len(owners)))]
    text = Text()
    for owner, cells in groupby(shown):
        colour = Style(color="black", bgcolor=f"color({_OWNER_COLOURS[owner % len(_OWNER_COLOURS)]})")
        text.append(_OWNER_SIGNS[owner % len(_OWNER_SIGNS)] * len(list(cells)), colour)
    return text


def put(*renderables: RenderableType) -> None:
    """Print to standard output; off a terminal, without the blanks that fill a table's lines."""
    out = console()
    if out.is_terminal:
        out.print(*renderables, sep="\n")
        return
    with out.capture() as captured:
        out.print(*renderables, sep="\n")
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def print_lines(lines: Iterable[Line]) -> None:
    """Print labelled lines, the labels in a column of their own."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in lines:
        table.add_row(label, value if isinstance(value, Text) else Text(value))
    put(table)


def table_of(*headings: str) -> Table:
    """Return an empty table in our style."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
