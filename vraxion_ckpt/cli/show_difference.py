"""Print the result of `diff`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from vraxion_ckpt.analysis.changes import Change, Difference, RingChange, Side
from vraxion_ckpt.cli.terminal import Line, byte_size, print_lines, put
from vraxion_ckpt.wording import count, listed, shortened

_MOST_ROWS = 12
_COLOURS = {"changed": "yellow", "renamed": "cyan", "added": "green", "removed": "red"}


def print_difference(facts: Difference) -> None:
    """Print a summary of the differences, then the first entries of each section."""
    lines: list[Line] = [("a", _side(facts.before)), ("b", _side(facts.after))]
    if facts.not_bound:
        lines.append(("note", f"optimizer compared by position, not by name: {facts.not_bound}"))
    lines += [("note", note) for note in facts.notes]
    lines += facts.summary()
    if facts.ring:
        lines.append(("arcs", _arcs(facts.ring)))
    lines.append(("compared", byte_size(facts.bytes_compared)))
    print_lines(lines)
    for title in ("model", "optimizer", "payload", "lifecycle", "history", "other"):
        changes = getattr(facts, title)
        if changes:
            put(Text(f"\n{title}", style="bold"), _table(changes))


def _side(side: Side) -> str:
    step = "" if side.step is None else f", step {side.step}"
    return f"{side.path} ({side.format}, {count(side.num_experts, 'expert')}{step})"


def _arcs(ring: RingChange) -> str:
    arcs = [
        f"{arc.start}…{(arc.start + arc.length - 1) % ring.length}" if arc.length > 1 else str(arc.start)
        for arc in ring.arcs
    ]
    return f"addresses {listed(arcs, 12)}"


def _table(changes: Sequence[Change]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for change in changes[:_MOST_ROWS]:
        table.add_row(Text(change.what, style=_COLOURS[change.what]), _entry(change))
    if len(changes) > _MOST_ROWS:
        table.add_row("…", Text(f"{len(changes) - _MOST_ROWS} more, see --json"))
    return table


def _entry(change: Change) -> Text:
    names = list(dict.fromkeys(name for name in (change.before, change.after) if name is not None))
    text = Text(" → ".join(names))
    if repr(change.old) == repr(change.new) or change.what in ("added", "removed"):
        values = [value for value in (change.new, change.old) if value is not None][:1]
    else:
        values = [change.old, change.new]
    if values:
        text.append("  " + " → ".join(map(_value, values)), "dim")
    if change.measure:
        text.append(f"; {change.measure}")
    return text


def _value(value: Any) -> str:
    return shortened(str(value), 60)
