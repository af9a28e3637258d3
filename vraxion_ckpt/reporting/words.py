"""Numbers as a report tells them."""

from __future__ import annotations


def percent(share: float) -> str:
    """Return a share for people: three significant digits."""
    return f"{share:.1%}" if share >= 0.1 or not share else f"{100 * share:#.3g}%"
