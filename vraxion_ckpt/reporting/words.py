"""Numbers as a report tells them."""

from __future__ import annotations


def percent(share: float) -> str:
    """Return a share for people: two significant digits at the least."""
    return f"{share:.1%}" if share >= 0.1 or not share else f"{100 * share:.2g}%"


def addresses(number: int) -> str:
    """Return a number of addresses for people."""
    return f"{number:,} address{'es' * (number != 1)}"
