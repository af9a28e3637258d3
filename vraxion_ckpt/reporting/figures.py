"""The figures of a report, as plotly.js takes them: plain data; colours of text and lines are the page's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vraxion_ckpt.reporting.drawing import (
    CHILD,
    DASHES,
    LOADS,
    MOST_BARS,
    PARENT,
    colour,
    curve,
    largest,
    ring_bars,
    ring_radius,
    ring_ticks,
)
from vraxion_ckpt.reporting.gather import Alike, Hot, Ring

Figure = dict[str, Any]


def ring_figure(one: Ring, hot: Hot | None, num_colours: int, *, room: bool) -> Figure:
    """Draw a ring: owners as sectors, visits as bars outside, the hot arc as a line inside.

    Args:
        one: the ring.
        hot: the hot arc.
        num_colours: for how many experts.
        room: whether there must be room for visits, here or on the ring beside it.
    """
    length = len(one.owners)
    traces = [
        {
            "type": "barpolar",
            "name": bars.name,
            "base": bars.base,
            "r": bars.heights,
            "theta": [middle * 360 for middle in bars.middles],
            "width": [width * 360 for width in bars.widths],
            "marker": {
                "color": bars.colours,
                "line": {"width": 0.5 if bars.outlined else 0, "color": "rgba(127,127,127,0.6)"},
            },
            "text": bars.texts,
            "hovertemplate": "%{text}<extra></extra>",
        }
        for bars in ring_bars(one, hot, num_colours)
    ]
    ticks = ring_ticks(length)
    side = 20 + 8 * len(f"{length:,}")  # the numbers beside the ring
    return {
        "data": traces,
        "layout": {
            "showlegend": False,
            "height": 440,
            "margin": {"l": side, "r": side, "t": 40, "b": 40},
            "polar": {
                "bgcolor": "rgba(0,0,0,0)",
                "radialaxis": {"visible": False, "range": [0, ring_radius(room=room)]},
                "angularaxis": {
                    "direction": "clockwise",
                    "rotation": 90,
                    "tickvals": [tick * 360 / length for tick in ticks],
                    "ticktext": [f"{tick:,}" for tick in ticks],
                    "ticks": "",
                    "showgrid": False,
                    "showline": False,
                },
            },
        },
    }


def share_figure(shares: Mapping[str, Sequence[float]], of: str, hot: Hot | None) -> Figure:
    """Draw the experts' shares: a bar each, or of many experts a curve, the largest first, with those of the split."""
    number = max(map(len, shares.values()), default=0)
    traces: list[dict[str, Any]] = []
    for name, values in shares.items():
        if number <= MOST_BARS:
            traces.append(
                {
                    "type": "bar",
                    "name": name,
                    "x": [str(i) for i in range(len(values))],
                    "y": list(values),
                    "marker": {"color": LOADS[name]},
                    "hovertemplate": f"expert %{{x}}, {name}: %{{y:.3~p}}<extra></extra>",
                }
            )
        else:
            points = curve(values)
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": name,
                    "x": [rank for rank, _ in points],
                    "y": [values[i] for _, i in points],
                    "text": [str(i) for _, i in points],
                    "line": {"color": LOADS[name], "width": 2, "dash": DASHES[name]},
                    "hovertemplate": f"expert %{{text}}, {name}: %{{y:.3~p}}<extra></extra>",
                }
            )
    if number > MOST_BARS and hot is not None:
        traces += [
            _marks(expert, tone, shares)
            for expert, tone in ((hot.parent, PARENT), (hot.child, CHILD))
            if expert is not None
        ]
    many = number > MOST_BARS
    return {
        "data": traces,
        "layout": {
            "height": 340,
            "barmode": "group",
            "bargap": 0.2 if number > 2 else 0.7,
            "margin": {"l": 70, "r": 20, "t": 40, "b": 60},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "showlegend": True,
            "xaxis": {
                "title": {"text": "rank" if many else "expert"},
                **({"type": "log", "dtick": 1} if many else {"type": "category", "showgrid": False}),
            },
            "yaxis": {
                "title": {"text": f"share of {of}"},
                "tickformat": ".2~p",
                "rangemode": "tozero",
            },
        },
    }


def _marks(expert: int, tone: str, shares: Mapping[str, Sequence[float]]) -> Figure:
    """Mark where an expert is on each of the curves."""
    places = [(name, values) for name, values in shares.items() if expert < len(values)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"expert {expert}",
        "x": [1 + largest(values, len(values)).index(expert) for _, values in places],
        "y": [values[expert] for _, values in places],
        "text": [name for name, _ in places],
        "marker": {"color": tone, "size": 11, "line": {"color": "#ffffff", "width": 1.5}},
        "hovertemplate": f"expert {expert}, %{{text}}: %{{y:.3~p}}<extra></extra>",
    }


def similarity_figure(alike: Alike) -> Figure:
    """Draw the cosines between experts as a matrix."""
    names = [str(i) for i in alike.ids]
    cells = [[None if np.isnan(value) else round(float(value), 6) for value in row] for row in alike.cosines]
    few = len(names) <= 12
    return {
        "data": [
            {
                "type": "heatmap",
                "x": names,
                "y": names,
                "z": cells,
                "zmin": -1,
                "zmax": 1,
                "colorscale": [[0, "#b35806"], [0.5, "#f2f2f2"], [1, "#2166ac"]],
                "xgap": 1,
                "ygap": 1,
                "hoverongaps": True,
                "hovertemplate": "experts %{y} and %{x}: cosine %{z}<extra></extra>",
                "colorbar": {"thickness": 12, "outlinewidth": 0},
                **({"texttemplate": "%{z:.3f}", "textfont": {"size": 11}} if few else {}),
            }
        ],
        "layout": {
            "height": 420,
            "margin": {"l": 60, "r": 20, "t": 20, "b": 60},
            "xaxis": {"type": "category", "automargin": True, "title": {"text": "expert", "standoff": 12}},
            "yaxis": {
                "type": "category",
                "automargin": True,
                "autorange": "reversed",
                "title": {"text": "expert", "standoff": 12},
            },
        },
    }


def norm_figure(alike: Alike, num_experts: int, hot: Hot | None) -> Figure:
    """Draw the norms of experts as bars."""
    return {
        "data": [
            {
                "type": "bar",
                "x": [str(i) for i in alike.ids],
                "y": [None if np.isnan(norm) else float(norm) for norm in alike.norms],
                "marker": {"color": [colour(i, num_experts, hot) for i in alike.ids]},
                "hovertemplate": "expert %{x}: norm %{y:.6g}<extra></extra>",
            }
        ],
        "layout": {
            "height": 420,
            "margin": {"l": 70, "r": 20, "t": 20, "b": 60},
            "showlegend": False,
            "bargap": 0.2 if len(alike.ids) > 2 else 0.7,
            "xaxis": {
                "type": "category",
                "automargin": True,
                "showgrid": False,
                "title": {"text": "expert", "standoff": 12},
            },
            "yaxis": {"title": {"text": "norm of its parameters"}, "rangemode": "tozero"},
        },
    }
