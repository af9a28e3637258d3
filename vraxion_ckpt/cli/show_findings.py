"""Print what `check` finds."""

from __future__ import annotations

from collections import Counter

from rich.table import Table
from rich.text import Text

from vraxion_ckpt.checking import Checked
from vraxion_ckpt.cli.terminal import print_lines, put, size
from vraxion_ckpt.findings import Finding, Severity

_MOST_ROWS = 40
_COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


def findings(facts: Checked) -> None:
    """Print the findings, the worst first, and whether the checkpoint is sound."""
    if facts.findings:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in facts.findings[:_MOST_ROWS]:
            table.add_row(Text(finding.severity, style=_COLOURS[finding.severity]), _in_words(finding))
        if len(facts.findings) > _MOST_ROWS:
            table.add_row("…", f"{len(facts.findings) - _MOST_ROWS} more, see --json")
        put(table)
    counts = Counter(finding.severity for finding in facts.findings)
    told = ", ".join(f"{counts[severity]} {severity}{'s' * (counts[severity] != 1)}" for severity in Severity)
    checksums = f"compared with {facts.manifest}" if facts.manifest else "without a manifest"
    print_lines(
        [
            ("sound" if facts.sound else "NOT SOUND", f"{facts.path} ({facts.format}): {told}"),
            ("read", f"{facts.tensors} tensors, {size(facts.bytes)}, in {facts.files} file{'s' * (facts.files != 1)}"),
            ("files", checksums),
        ]
    )


def _in_words(finding: Finding) -> Text:
    text = Text(f"{finding.where}: {finding.what}" if finding.where else finding.what)
    if finding.hint:
        text.append(f"\n→ {finding.hint}", "dim")
    return text
