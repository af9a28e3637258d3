"""Print facts on a terminal: labelled lines, tables, sizes, and the ring as a band of colours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby

import click
import numpy as np
from rich.console import Console, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from vraxion_ckpt.checkpoint.ring import Ints
from vraxion_ckpt.reporting.colours import expert_colour, text_colour

Line = tuple[str, str | Text]

MOST_ROWS = 16
# Spaces between columns, and the longest word that is not broken within a column.
_GAP = 2
_LONGEST_WORD = 18
_OWNER_SIGNS = "0123456789abcdefghijklmnopqrstuvwxyz"


def console() -> Console:
    """Return the console for standard output. It uses colours on a terminal, unless NO_COLOR is set."""
    return Console(highlight=False)


def byte_size(number: int) -> str:
    """Return a number of bytes with a unit, like ``1.5 MiB``."""
    value, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def band(owners: Ints, width: int) -> Text:
    """Draw a ring as one line of cells, each in the colour of its owner.

    Args:
        owners: the expert of each address, shape ``[L]``.
        width: the largest number of cells. If there are more addresses, a cell stands for several and shows the expert
            that owns most of them.
    """
    shown = [Counter(cell.tolist()).most_common(1)[0][0] for cell in np.array_split(owners, min(width, len(owners)))]
    text = Text()
    for owner, cells in groupby(shown):
        text.append(_OWNER_SIGNS[owner % len(_OWNER_SIGNS)] * len(list(cells)), style_of(owner))
    return text


def style_of(expert: int) -> Style:
    """Return a style whose background is the colour of the expert in reports. Text on it is readable."""
    colour = expert_colour(expert)
    return Style(color=text_colour(colour), bgcolor=colour)


def put(*renderables: RenderableType) -> None:
    """Print to standard output. If it is not a terminal, omit trailing blanks."""
    out = console()
    if out.is_terminal:
        out.print(*renderables, sep="\n")
        return
    with out.capture() as captured:
        out.print(*renderables, sep="\n")
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def print_lines(lines: Iterable[Line]) -> None:
    """Print labelled lines, with the labels in a column of their own."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in lines:
        table.add_row(label, value if isinstance(value, Text) else Text(value))
    put(table)


def put_section(title: str, *renderables: RenderableType) -> None:
    """Print an empty line, a heading and the content."""
    put(Text(f"\n{title}", style="bold"), *renderables)


def put_table(headings: Sequence[str], rows: Sequence[Sequence[str | Text]], numbers: Collection[int] = ()) -> None:
    """Print a table. If the terminal is too narrow, print each row as labelled lines.

    Args:
        headings: the headings of the columns.
        rows: the cells of each row.
        numbers: indices of the columns that are right-aligned and never wrapped.
    """
    columns = [[heading, *map(str, cells)] for heading, *cells in zip(headings, *rows, strict=True)]
    widths = [max(len(cell) if place in numbers else _widest(cell) for cell in column)
              for place, column in enumerate(columns)]  # fmt: skip
    if sum(widths) + _GAP * len(widths) <= console().width + _GAP:
        table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="bold")
        for place, (heading, width) in enumerate(zip(headings, widths, strict=True)):
            numeric = place in numbers
            table.add_column(
                heading,
                overflow="fold",
                min_width=width,
                justify="right" if numeric else "left",
                no_wrap=numeric,
            )
        for row in rows:
            table.add_row(*row)
        put(table)
        return
    for name, *cells in rows:
        put(name)
        print_lines([(f"  {heading}", cell) for heading, cell in zip(headings[1:], cells, strict=True) if str(cell)])


def _widest(cell: str) -> int:
    """Return the width of the longest word, at most `_LONGEST_WORD`. Longer words may be broken."""
    return min(_LONGEST_WORD, max(map(len, cell.split()), default=0))
