"""Draw the rings and the shares as a PNG with matplotlib."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from vraxion_ckpt.printable import in_one_line
from vraxion_ckpt.reporting.colours import LOADS, expert_colour
from vraxion_ckpt.reporting.drawing import (
    DASHES,
    MOST_BARS,
    KeyEntry,
    caption,
    curve,
    key_entries,
    key_note,
    largest,
    ring_bars,
    ring_labels,
    ring_radius,
    ring_ticks,
)
from vraxion_ckpt.reporting.gather import Ring, Subject

_STYLES = {"solid": "-", "dash": "--", "dot": ":"}
# More experts than this have a legend of their own, with this many columns for each ring.
_FEW_EXPERTS = 4
_KEY_COLUMNS = 10


def draw(subject: Subject) -> bytes:
    """Return the rings and the shares as a PNG with a white background."""
    columns = max(1, len(subject.rings))
    height = 9.2 if subject.rings else 2.0
    figure = Figure(figsize=(6 * columns, height), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    # Without parse_math=False, matplotlib would interpret $ in a name as mathematics.
    figure.suptitle(f"{in_one_line(subject.name)}\n{subject.headline}", fontsize=12, wrap=True, parse_math=False)
    if subject.rings:
        grid = figure.add_gridspec(3, columns, height_ratios=(1.9, 1, 0.01))
        room = any(one.visits is not None for one in subject.rings)
        for place, one in enumerate(subject.rings):
            _ring(figure.add_subplot(grid[0, place], projection="polar"), one, subject, room=room)
        _shares(figure.add_subplot(grid[1, :]), subject)
        _key(figure, figure.add_subplot(grid[2, :]), subject)
    else:
        figure.text(0.5, 0.3, "no ring of experts to draw", ha="center", fontsize=11)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # matplotlib draws a box instead
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _key(figure: Figure, axes: Any, subject: Subject) -> None:
    """Draw the legend. If there are many experts, their ids are in a separate legend."""
    axes.axis("off")
    key = key_entries(subject)
    experts = [entry for entry in key if entry.number and not entry.text]
    if len(experts) > _FEW_EXPERTS:
        key = [entry for entry in key if entry not in experts]
        columns = len(subject.rings) * _KEY_COLUMNS
        patches = [Patch(color=entry.colour, label=entry.number) for entry in experts]
        # matplotlib fills column by column; the ids should increase row by row.
        by_column = [patch for column in range(columns) for patch in patches[column::columns]]
        title = f"experts; {note}" if (note := key_note(subject)) else "experts"
        options = {"frameon": False, "fontsize": 9, "handlelength": 1.2, "columnspacing": 0.9}
        axes.legend(handles=by_column, title=title, loc="upper center", ncols=columns, **options)
    patches = [Patch(color=entry.colour, label=_label(entry)) for entry in key]
    figure.legend(handles=patches, loc="outside lower center", ncols=max(1, len(key)), frameon=False, fontsize=9)


def _label(entry: KeyEntry) -> str:
    return " ".join(filter(None, (entry.number and f"expert {entry.number}", entry.text)))


def _ring(axes: Any, one: Ring, subject: Subject, *, room: bool) -> None:
    length = len(one.owners)
    for bars in ring_bars(one, subject.hot):
        axes.bar(
            [middle * math.tau for middle in bars.middles],
            bars.heights,
            [width * math.tau for width in bars.widths],
            bottom=bars.base,
            color=bars.colours,
            edgecolor="white",
            linewidth=0.4 if bars.outlined else 0,
        )
    for label in ring_labels(one):
        place = label.middle * math.tau, label.radius
        axes.text(*place, str(label.expert), color=label.colour, fontsize=9, ha="center", va="center")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_ylim(0, ring_radius(room=room))
    for artist in axes.patches:
        artist.set_in_layout(False)  # faster with thousands of bars, which are inside the axes anyway
    axes.set_yticks([])
    ticks = ring_ticks(length)
    axes.set_xticks([tick * math.tau / length for tick in ticks], [f"{tick:,}" for tick in ticks])
    axes.grid(visible=False)
    axes.spines["polar"].set_visible(False)
    axes.set_title(one.title.capitalize(), fontsize=11)
    axes.set_xlabel(textwrap.fill(caption(one, subject.hot), 90), fontsize=8)


def _shares(axes: Any, subject: Subject) -> None:
    number = max(map(len, subject.shares.values()))
    if number <= MOST_BARS:
        _bars(axes, subject, number)
    else:
        _curves(axes, subject)
    axes.set_ylabel(f"share of {subject.shares_of}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(subject.shares), borderaxespad=0)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Any, subject: Subject, number: int) -> None:
    width = 0.8 / len(subject.shares)
    for place, (name, values) in enumerate(subject.shares.items()):
        at = [i + (place - (len(subject.shares) - 1) / 2) * width for i in range(len(values))]
        axes.bar(at, values, width, label=name, color=LOADS[name])
    axes.set_xticks(range(number))
    axes.set_xlim(-0.5 - (number < 3), number - 0.5 + (number < 3))
    axes.set_xlabel("expert")


def _curves(axes: Any, subject: Subject) -> None:
    for name, values in subject.shares.items():
        ranks, ids = zip(*curve(values), strict=True)
        style = _STYLES[DASHES[name]]
        axes.plot(ranks, [values[i] for i in ids], label=name, color=LOADS[name], linestyle=style)
    for expert in (subject.hot.parent, subject.hot.child) if subject.hot else ():
        for values in subject.shares.values():
            if expert is not None and expert < len(values):
                rank = 1 + largest(values, len(values)).index(expert)
                axes.plot(rank, values[expert], marker="o", color=expert_colour(expert), zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("rank (1: the largest share)")
