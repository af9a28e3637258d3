"""The rows of the table: the figure to reach, the repeats, how they are judged and printed."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

WIDTH = 80
HEADING = f"{'work':<39} {'median':>7} {'min–max':>13}   {'to reach':>8} {'':>7}"


@dataclass(frozen=True)
class Goal:
    """What a row measures, and the figure to reach.

    Attributes:
        what: the name of the row.
        to_reach: the largest figure that meets the goal; None if the row is for information.
        unit: ``×`` for ratios, ``MiB`` for memory, empty for counts.
    """

    what: str
    to_reach: float | None
    unit: str = "×"

    @classmethod
    def memory(cls, what: str) -> Goal:
        """Return the bound on the anonymous memory of a conversion, beyond what it cannot do without."""
        return cls(f"{what}, memory", 64, "MiB")


@dataclass(frozen=True)
class Row:
    """One measured row.

    Attributes:
        repeats: the figure of each repeat; empty if the row was skipped.
        ours: what each repeat of ours cost, in seconds or bytes.
        others: what each repeat of the other operation cost.
        skipped: why the row was skipped, or empty.
    """

    goal: Goal
    repeats: tuple[float, ...]
    ours: tuple[float, ...] = ()
    others: tuple[float, ...] = ()
    skipped: str = ""

    @property
    def measured(self) -> float | None:
        """The figure that is judged: the largest for memory, the median otherwise; None if the row was skipped."""
        if not self.repeats:
            return None
        return max(self.repeats) if self.goal.unit == "MiB" else statistics.median(self.repeats)

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None if the row was skipped or has no goal."""
        if self.measured is None or self.goal.to_reach is None:
            return None
        return self.measured <= self.goal.to_reach

    def __str__(self) -> str:
        if self.measured is None:
            reason = textwrap.fill(self.skipped, WIDTH, initial_indent="    ", subsequent_indent="    ")
            return f"{self.goal.what:<39} {'skipped':>7}\n{reason}"
        spread = f"{figure(min(self.repeats))}–{figure(max(self.repeats))}"
        goal = "" if self.goal.to_reach is None else f"≤ {self.goal.to_reach:g}"
        verdict = {True: "met", False: "NOT met", None: ""}[self.met]
        line = (
            f"{self.goal.what:<39} {figure(self.measured):>7} {spread:>13} {self.goal.unit:<3} {goal:>6} {verdict:>7}"
        )
        return line.rstrip()

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON values, with all repeats."""
        return {
            **asdict(self.goal),
            "measured": self.measured,
            "met": self.met,
            "repeats": list(self.repeats),
            "ours": list(self.ours),
            "others": list(self.others),
            "skipped": self.skipped,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        """Return the row that `as_json` wrote."""
        goal = Goal(values["what"], values["to_reach"], values["unit"])
        repeats, ours, others = (tuple(values[key]) for key in ("repeats", "ours", "others"))
        return cls(goal, repeats, ours, others, values["skipped"])


def figure(value: float) -> str:
    """Return a number with two decimals, or with fewer if it is large."""
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def ratios(goal: Goal, ours: Sequence[float], others: Sequence[float]) -> Row:
    """Return the row of the ratios of alternating repeats."""
    pairs = zip(ours, others, strict=True)
    return Row(goal, tuple(mine / other for mine, other in pairs), tuple(ours), tuple(others))


def skipped(goals: Sequence[Goal], reason: str) -> list[Row]:
    """Return rows that say why they were not measured."""
    return [Row(goal, (), skipped=reason) for goal in goals]
