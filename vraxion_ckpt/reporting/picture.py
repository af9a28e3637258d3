"""The same as a static picture: rings and shares, by matplotlib."""

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
from vraxion_ckpt.reporting.drawing import (
    CHILD,
    DASHES,
    LOADS,
    MOST_BARS,
    PARENT,
    caption,
    curve,
    largest,
    named_colours,
    palette,
    ring_bars,
    ring_radius,
    ring_ticks,
)
from vraxion_ckpt.reporting.gather import Hot, Ring, Subject

_STYLES = {"solid": "-", "dash": "--", "dot": ":"}


def draw(subject: Subject) -> bytes:
    """Return the rings and the shares as a PNG, on white."""
    columns = max(1, len(subject.rings))
    height = 9.2 if subject.rings else 2.0
    figure = Figure(figsize=(6 * columns, height), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    # A name may hold signs that mathematics is made of.
    figure.suptitle(f"{in_one_line(subject.name)}\n{subject.headline}", fontsize=12, wrap=True, parse_math=False)
    if subject.rings:
        grid = figure.add_gridspec(2, columns, height_ratios=(1.9, 1))
        room = any(one.visits is not None for one in subject.rings)
        for place, one in enumerate(subject.rings):
            axes = figure.add_subplot(grid[0, place], projection="polar")
            _ring(axes, one, subject.hot, palette(subject), room=room)
        _shares(figure.add_subplot(grid[1, :]), subject)
    else:
        figure.text(0.5, 0.3, "no ring of experts to draw", ha="center", fontsize=11)
    key = [Patch(color=tone, label=name) for tone, name in named_colours(subject)]
    figure.legend(handles=key, loc="outside lower center", ncols=min(8, max(1, len(key))), frameon=False, fontsize=9)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands for it
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _ring(axes: Any, one: Ring, hot: Hot | None, num_colours: int, *, room: bool) -> None:
    length = len(one.owners)
    for bars in ring_bars(one, hot, num_colours):
        axes.bar(
            [middle * math.tau for middle in bars.middles],
            bars.heights,
            [width * math.tau for width in bars.widths],
            bottom=bars.base,
            color=bars.colours,
            edgecolor="white",
            linewidth=0.4 if bars.outlined else 0,
        )
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_ylim(0, ring_radius(room=room))
    for artist in axes.patches:
        artist.set_in_layout(False)  # they are inside anyway, and thousands
    axes.set_yticks([])
    ticks = ring_ticks(length)
    axes.set_xticks([tick * math.tau / length for tick in ticks], [f"{tick:,}" for tick in ticks])
    axes.grid(visible=False)
    axes.spines["polar"].set_visible(False)
    axes.set_title(one.title, fontsize=11)
    axes.set_xlabel(textwrap.fill(caption(one, hot), 90), fontsize=8)


def _shares(axes: Any, subject: Subject) -> None:
    number = max(map(len, subject.shares.values()))
    for place, (name, values) in enumerate(subject.shares.items()):
        if number <= MOST_BARS:
            width = 0.8 / len(subject.shares)
            at = [i + (place - (len(subject.shares) - 1) / 2) * width for i in range(len(values))]
            axes.bar(at, values, width, label=name, color=LOADS[name])
        else:
            ranks, ids = zip(*curve(values), strict=True)
            style = _STYLES[DASHES[name]]
            axes.plot(ranks, [values[i] for i in ids], label=name, color=LOADS[name], linestyle=style)
    if number > MOST_BARS and subject.hot is not None:
        for expert, tone in ((subject.hot.parent, PARENT), (subject.hot.child, CHILD)):
            for values in subject.shares.values():
                if expert is not None and expert < len(values):
                    rank = 1 + largest(values, len(values)).index(expert)
                    axes.plot(rank, values[expert], marker="o", color=tone, zorder=3)
    if number <= MOST_BARS:
        axes.set_xticks(range(number))
        axes.set_xlim(-0.5 - (number < 3), number - 0.5 + (number < 3))
        axes.set_xlabel("expert")
    else:
        axes.set_xscale("log")
        axes.set_xlabel("rank")
    axes.set_ylabel(f"share of {subject.shares_of}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(subject.shares), borderaxespad=0)
    axes.spines[["top", "right"]].set_visible(False)
