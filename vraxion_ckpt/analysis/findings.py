"""The findings of `check` and their severity."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from vraxion_ckpt.support.json_models import Fact


class Severity(StrEnum):
    """The severity of a finding."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Finding(Fact):
    """One problem or remark."""

    severity: Severity
    rule: str
    """The name of the rule: ``readable``, ``invariant``, ``one head``, ``manifest``, …"""
    what: str
    where: str = ""
    """The file or the entry that it is about."""
    hint: str | None = None
    """What to do about it."""

    @classmethod
    def error(cls, rule: str, what: str, where: str = "", hint: str | None = None) -> Self:
        """Return an error."""
        return cls(severity=Severity.ERROR, rule=rule, what=what, where=where, hint=hint)

    @classmethod
    def warning(cls, rule: str, what: str, where: str = "", hint: str | None = None) -> Self:
        """Return a warning."""
        return cls(severity=Severity.WARNING, rule=rule, what=what, where=where, hint=hint)

    @classmethod
    def note(cls, rule: str, what: str, where: str = "", hint: str | None = None) -> Self:
        """Return a note."""
        return cls(severity=Severity.NOTE, rule=rule, what=what, where=where, hint=hint)
