"""Print the result of `check`."""

from __future__ import annotations

from collections import Counter

from rich.table import Table
from rich.text import Text

from vraxion_ckpt.analysis.checking import Checked
from vraxion_ckpt.analysis.findings import Finding, Severity
from vraxion_ckpt.cli.terminal import byte_size, print_lines, put
from vraxion_ckpt.wording import count

_MOST_ROWS = 40
_COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


def print_findings(facts: Checked) -> None:
    """Print the findings, errors first, and whether the checkpoint is sound."""
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
    parts = ", ".join(count(counts[severity], severity) for severity in Severity)
    checksums = f"compared with {facts.manifest}" if facts.manifest else "without a manifest"
    print_lines(
        [
            ("sound" if facts.sound else "NOT SOUND", f"{facts.path} ({facts.format}): {parts}"),
            ("read", f"{count(facts.tensors, 'tensor')}, {byte_size(facts.bytes)}, in {count(facts.files, 'file')}"),
            ("files", checksums),
        ]
    )


def _in_words(finding: Finding) -> Text:
    text = Text(f"{finding.where}: {finding.what}" if finding.where else finding.what)
    if finding.hint:
        text.append(f"\n→ {finding.hint}", "dim")
    return text
