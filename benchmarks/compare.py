"""Compare a run with an older one."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import WIDTH, Row, figure

TOLERANCE = 0.1


class NotComparableError(Exception):
    """The older run cannot be read, or had other sizes."""


def read_older(path: Path, sizes: Mapping[str, float]) -> dict[str, Any]:
    """Return the JSON of an older run.

    Raises:
        NotComparableError: `path` is not the JSON of a run, or the run had other sizes than `sizes`.
    """
    try:
        older = json.loads(path.read_text())
        others = dict(older["sizes"])
        for row in older["rows"]:
            Row.from_json(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotComparableError(f"{path} is not the JSON of a run: {error!r}") from error
    differing = [f"--{name.replace('_', '-')}={others[name]:g}" for name in others if others[name] != sizes.get(name)]
    if differing:
        raise NotComparableError(f"{path} was measured with other sizes; use {' '.join(differing)}")
    return dict(older)


def slower(old: Row, new: Row) -> bool:
    """Return whether a row got worse by more than a tenth, and its spread lies above the spread before.

    The tenth is one of the old figure. For memory, it is a tenth of the figure to reach, because that is a bound on
    what is added to a process, which may be next to nothing.
    """
    if old.measured is None or new.measured is None:
        return False
    whole = new.goal.to_reach if new.goal.unit == "MiB" and new.goal.to_reach else old.measured
    return new.measured > old.measured + TOLERANCE * whole and min(new.repeats) > max(old.repeats)


def report(older: Mapping[str, Any], machine: Mapping[str, Any], rows: Sequence[Row]) -> tuple[str, bool]:
    """Return the comparison in words, and whether a row got slower."""
    before = {row["what"]: Row.from_json(row) for row in older["rows"]}
    pairs = [(before[row.goal.what], row) for row in rows if row.goal.what in before]
    pairs = [(old, new) for old, new in pairs if old.repeats and new.repeats]
    worse = [(old, new) for old, new in pairs if slower(old, new)]
    lines = [f"{len(pairs)} of {len(rows)} rows compared, {len(worse)} got slower by more than a tenth"]
    for old, new in worse:
        assert old.measured is not None
        assert new.measured is not None
        lines.append(
            f"{new.goal.what:<39} {figure(old.measured):>7} → {figure(new.measured):>7} {new.goal.unit}".rstrip()
        )
    other = [key for key in machine if machine[key] != older.get("machine", {}).get(key)]
    if other:
        lines.append(textwrap.fill(f"note: the older run differs in {', '.join(other)}", WIDTH))
    return "\n".join(lines), bool(worse)
