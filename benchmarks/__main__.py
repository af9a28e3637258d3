"""Print the table of what the program costs, and write it as JSON."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

from benchmarks import compare, machine
from benchmarks.measuring import BenchmarkError
from benchmarks.rows import GROUPS
from benchmarks.settings import FULL, Settings, Sizes
from benchmarks.table import HEADING, WIDTH, Row


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line. `sizes` has the sizes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    small = Sizes()
    for size in fields(Sizes):
        default, full = getattr(small, size.name), getattr(FULL, size.name)
        also = f"; with --full: {full}" if full != default else ""
        help_text = f"{size.metadata['help']} (default: {default}{also})"
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=type(default), metavar="N", help=help_text)
    parser.add_argument("--full", action="store_true", help="the sizes for which the figures to reach are stated")
    parser.add_argument("--only", metavar="PATTERN", help="only rows whose name matches this regular expression")
    parser.add_argument("--folder", type=Path, help="where to work (default: /dev/shm if it has the space)")
    parser.add_argument("--scale", type=Path, metavar="FOLDER", help="also write a checkpoint larger than memory here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="print what got slower since FILE was written")
    options = parser.parse_args(arguments)
    given = {size.name: getattr(options, size.name) for size in fields(Sizes)}
    given = {name: value for name, value in given.items() if value is not None}
    options.sizes = replace(FULL if options.full else small, **given)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table.

    Returns:
        1 if a bound on memory is exceeded, or if something got slower than in the run of ``--compare``. 2 if a
        measurement failed, or if that run is not comparable. Otherwise 0: times depend on the machine.
    """
    options = parse(arguments)
    try:
        older = compare.read_older(options.compare, asdict(options.sizes)) if options.compare else None
        with ExitStack() as stack:
            parent = options.folder or machine.place_with_room(options.sizes.room)
            folder = stack.enter_context(_folder_in(parent))
            scale_folder = stack.enter_context(_folder_in(options.scale)) if options.scale else None
            where = machine.describe(folder)
            print(machine.in_words(where))
            rows: list[Row] = []
            for row in measured(Settings(options.sizes, folder, scale_folder), options.only):
                rows.append(row)
                print(row, flush=True)
                if options.json:  # now, so that an interrupted run leaves the rows that it has
                    _write(options.json, where, options.sizes, rows)
    except (BenchmarkError, compare.NotComparableError) as error:
        print(error, file=sys.stderr)
        return 2
    worse = False
    if older:
        text, worse = compare.report(older, where, rows)
        print(f"\n{text}")
    return int(worse or any(row.met is False for row in rows if row.goal.unit == "MiB"))


def measured(settings: Settings, pattern: str | None) -> Iterator[Row]:
    """Print the heading, then yield the rows as they are measured, in the order of the table."""
    sizes = (f"{name}={value}" for name, value in asdict(settings.sizes).items())
    print(textwrap.fill(", ".join(sizes), WIDTH))
    print(HEADING.rstrip(), flush=True)
    wanted = re.compile(pattern or "")
    for group in GROUPS:
        if any(wanted.search(goal.what) for goal in group.goals):
            yield from group.measure(settings)


@contextmanager
def _folder_in(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vraxion-bench-", dir=parent) as folder:
        yield Path(folder)


def _write(path: Path, where: Mapping[str, str | int], sizes: Sizes, rows: Sequence[Row]) -> None:
    table = {"machine": where, "sizes": asdict(sizes), "rows": [row.as_json() for row in rows]}
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
