"""Numbers as texts of a report."""

from __future__ import annotations


def percent(share: float) -> str:
    """Return a share in percent, with three significant digits."""
    return f"{share:.1%}" if share >= 0.1 or not share else f"{100 * share:#.3g}%"


def addresses(number: int) -> str:
    """Return a number with its noun: ``1 address``, ``2 addresses``."""
    return f"{number:,} address{'es' * (number != 1)}"


def experts(number: int) -> str:
    """Return a number with its noun: ``1 expert``, ``2 experts``."""
    return f"{number:,} expert{'s' * (number != 1)}"
