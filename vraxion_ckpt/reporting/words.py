"""Format numbers for reports."""

from __future__ import annotations


def percent(share: float) -> str:
    """Return a share in percent, with three significant digits."""
    return f"{share:.1%}" if share >= 0.1 or not share else f"{100 * share:#.3g}%"
