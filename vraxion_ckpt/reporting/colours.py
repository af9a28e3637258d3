"""The colours of reports, pictures and the terminal.

An expert's colour depends on its id alone, so it is the same before and after a split, in every report, and on a
terminal.
"""

from __future__ import annotations

# Each colour differs as much as possible from those before it, for all kinds of colour vision, on white and near-black.
# All are in the 256-colour palette of terminals, so a terminal shows exactly the same colours.
_EXPERTS = (
    "#005faf", "#d75f00", "#5fd7ff", "#8787ff", "#ffaf00", "#af87af", "#005f00", "#afd787", "#af5f5f", "#87afff",
    "#87af87", "#875f87", "#875fd7", "#ffafd7", "#ff8700", "#d787d7", "#af5faf", "#afaf5f", "#5f87d7", "#ff87af",
    "#00afd7", "#af875f", "#d75f87", "#87d7af", "#875f00", "#005f5f", "#878700", "#0087af", "#d7af87", "#afafd7",
    "#87af00", "#ffafff", "#87d75f", "#5fafaf", "#5fd7d7", "#af5f00", "#d7875f", "#5faf5f", "#d787af", "#ffafaf",
)  # fmt: skip
NUM_COLOURS = len(_EXPERTS)

HOT_ARC = "#d70087"
VISITS = "#808080"
# Shares of visits are called before, predicted or measured, and shares of addresses before or after. Without a split to
# show, there is only "now".
LOADS = {"before": "#b2b2b2", "predicted": "#767676", "measured": "#00875f", "after": "#767676", "now": "#767676"}


def expert_colour(expert: int) -> str:
    """Return the colour of an expert as ``#rrggbb``. Colours repeat after `NUM_COLOURS` experts."""
    return _EXPERTS[expert % NUM_COLOURS]


def text_colour(background: str) -> str:
    """Return black or white, whichever has more contrast with a background."""
    red, green, blue = (_linear(int(background[place : place + 2], 16) / 255) for place in (1, 3, 5))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if luminance > 0.179 else "#ffffff"


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)
