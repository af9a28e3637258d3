"""The same as a static picture: rings and shares, by matplotlib."""

from __future__ import annotations

import io
import math
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vraxion_ckpt.reporting.drawing import HOT, LOADS, VISITS, binned, caption, colour, largest, named_colours, sectors
from vraxion_ckpt.reporting.gather import Hot, Ring, Subject
from vraxion_ckpt.reporting.words import percent

_MOST_BARS = 32


def draw(subject: Subject) -> bytes:
    """Return the rings and the shares as a PNG, on white."""
    columns = max(1, len(subject.rings))
    figure = Figure(figsize=(6 * columns, 9.2), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{subject.name}\n{subject.headline}", fontsize=12, wrap=True)
    grid = figure.add_gridspec(2, columns, height_ratios=(1.9, 1))
    for place, one in enumerate(subject.rings):
        _ring(figure.add_subplot(grid[0, place], projection="polar"), one, subject.hot)
    if subject.shares:
        _shares(figure.add_subplot(grid[1, :]), subject)
    key = [Patch(color=tone, label=name) for tone, name in named_colours(subject)]
    figure.legend(handles=key, loc="outside lower center", ncols=min(8, max(1, len(key))), frameon=False, fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _ring(axes: Any, one: Ring, hot: Hot | None) -> None:
    length = len(one.owners)
    turn = 2 * math.pi / length
    parts, _ = sectors(one.owners)
    shown = hot if hot is not None and hot.arc.ring_len == length else None
    axes.bar(
        [(part.start + part.length / 2) * turn for part in parts],
        [0.38] * len(parts),
        [part.length * turn for part in parts],
        bottom=0.62,
        color=[colour(part.owner, one.num_experts, shown) for part in parts],
        edgecolor="white",
        linewidth=0.4 if 1 < len(parts) <= 360 else 0,
    )
    if one.visits is not None:
        starts, lengths, means = binned(one.visits)
        top = max(means) or 1.0
        axes.bar(
            [(start + size / 2) * turn for start, size in zip(starts, lengths, strict=True)],
            [0.42 * mean / top for mean in means],
            [size * turn for size in lengths],
            bottom=1.04,
            color=VISITS,
        )
    if shown is not None:
        arc = shown.arc
        axes.bar(
            [(arc.start + arc.length / 2) * turn],
            [0.06],
            [max(arc.length * turn, math.radians(1))],
            bottom=0.49,
            color=HOT,
        )
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 1.46)
    axes.set_yticks([])
    ticks = sorted({0, length // 4, length // 2, 3 * length // 4})
    axes.set_xticks([tick * turn for tick in ticks], [f"{tick:,}" for tick in ticks])
    axes.grid(visible=False)
    axes.spines["polar"].set_visible(False)
    axes.set_title(one.title, fontsize=11)
    axes.set_xlabel(caption(one), fontsize=8, wrap=True)


def _shares(axes: Any, subject: Subject) -> None:
    number = max(map(len, subject.shares.values()))
    for place, (name, values) in enumerate(subject.shares.items()):
        if number <= _MOST_BARS:
            width = 0.8 / len(subject.shares)
            at = [i + (place - (len(subject.shares) - 1) / 2) * width for i in range(len(values))]
            axes.bar(at, values, width, label=name, color=LOADS[name])
        else:
            ordered = [values[i] for i in largest(values, len(values))]
            axes.plot(range(1, len(ordered) + 1), ordered, label=name, color=LOADS[name])
    if number <= _MOST_BARS:
        axes.set_xticks(range(number))
        axes.set_xlabel("expert")
    else:
        axes.set_xscale("log")
        axes.set_xlabel("rank")
    axes.set_ylabel(f"share of {subject.shares_of}")
    axes.yaxis.set_major_formatter(lambda value, _: percent(value))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(subject.shares), borderaxespad=0)
    axes.spines[["top", "right"]].set_visible(False)
