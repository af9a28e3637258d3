"""Numbers as a report tells them."""

from __future__ import annotations


def percent(share: float) -> str:
    """Return a share for people: three significant digits."""
    return f"{share:.1%}" if share >= 0.1 or not share else f"{100 * share:#.3g}%"


def addresses(number: int) -> str:
    """Return a number of addresses for people."""
    return f"{number:,} address{'es' * (number != 1)}"


def experts(number: int) -> str:
    """Return a number of experts for people."""
    return f"{number:,} expert{'s' * (number != 1)}"
