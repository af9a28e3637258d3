"""Print the result of `report`."""

from __future__ import annotations

from vraxion_ckpt.cli.terminal import Line, byte_size, print_lines
from vraxion_ckpt.reporting.report import Reported


def print_report(facts: Reported) -> None:
    """Print the files and the headline of a report."""
    lines: list[Line] = []
    if facts.page:
        lines.append(("page", f"{facts.page}, {byte_size(facts.page_bytes)}"))
    if facts.picture:
        lines.append(("picture", f"{facts.picture}, {byte_size(facts.picture_bytes)}"))
    print_lines([*lines, ("headline", facts.headline)])
