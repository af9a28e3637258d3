"""What `check` reports: findings and how bad they are."""

from __future__ import annotations

from enum import StrEnum

from vraxion_ckpt.support.json_models import Fact


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Finding(Fact):
    """One thing that was found."""

    severity: Severity
    rule: str
    """Which of the rules it breaks: ``readable``, ``invariant``, ``one head``, ``manifest``, …"""
    what: str
    where: str = ""
    """The file or the entry."""
    hint: str | None = None
    """What to do about it."""
