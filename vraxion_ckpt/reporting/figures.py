"""The figures of a report, as data for plotly.js. The page's script sets the colours of text and lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vraxion_ckpt.reporting.colours import LOADS, expert_colour
from vraxion_ckpt.reporting.drawing import (
    DASHES,
    MOST_BARS,
    Bars,
    Label,
    curve,
    largest,
    ring_bars,
    ring_labels,
    ring_radius,
    ring_ticks,
)
from vraxion_ckpt.reporting.gather import Hot, Ring
from vraxion_ckpt.reporting.similarity import Group, Similarity

Figure = dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """A figure with its heading and caption.

    Attributes:
        name: the id of its HTML element.
        title: the heading above the figure, or empty.
    """

    name: str
    figure: Figure
    title: str
    caption: str


# Matrices with more rows than this have no values in their cells.
_MOST_WRITTEN = 12
# Matrices with more rows than this have no gaps between their cells.
_MOST_APART = 24
# The ids of more copies than this do not fit on an axis.
_MOST_LISTED = 3


def ring_figure(one: Ring, hot: Hot | None, *, room: bool) -> Figure:
    """Draw a ring with owners as sectors, visits as bars outside, and the hot arc as a line inside.

    Args:
        one: the ring.
        hot: the hot arc, if there is one.
        room: whether to leave room for visits even if this ring has none, so that two rings have the same scale.
    """
    length = len(one.owners)
    ticks = ring_ticks(length)
    side = 20 + 8 * len(f"{length:,}")  # room for the numbers next to the ring
    return {
        "data": [*map(_bar_trace, ring_bars(one, hot)), _label_trace(ring_labels(one))],
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


def _bar_trace(bars: Bars) -> dict[str, Any]:
    return {
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


def _label_trace(labels: Sequence[Label]) -> dict[str, Any]:
    return {
        "type": "scatterpolar",
        "mode": "text",
        "name": "labels",
        "r": [label.radius for label in labels],
        "theta": [label.middle * 360 for label in labels],
        "text": [str(label.expert) for label in labels],
        "customdata": [label.width for label in labels],
        "textfont": {"color": [label.colour for label in labels], "size": 12},
        "hoverinfo": "skip",
    }


def share_figure(shares: Mapping[str, Sequence[float]], of: str, hot: Hot | None) -> Figure:
    """Draw the experts' shares as bars. If there are many, draw a curve and mark the experts of the split."""
    number = max(map(len, shares.values()), default=0)
    many = number > MOST_BARS
    traces = [(_curve if many else _bars)(name, values) for name, values in shares.items()]
    if many and hot is not None:
        traces += [_marks(expert, shares) for expert in (hot.parent, hot.child) if expert is not None]
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
                "title": {"text": "rank (1: the largest share)" if many else "expert", "standoff": 10},
                "automargin": True,
                **({"type": "log", "dtick": 1} if many else {"type": "category", "showgrid": False}),
            },
            "yaxis": {
                "title": {"text": f"share of {of}", "standoff": 12},
                "automargin": True,
                "tickformat": ".2~p",
                "rangemode": "tozero",
            },
        },
    }


def _bars(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {
        "type": "bar",
        "name": name,
        "x": [str(i) for i in range(len(values))],
        "y": list(values),
        "marker": {"color": LOADS[name]},
        "hovertemplate": f"expert %{{x}}, {name}: %{{y:.3~p}}<extra></extra>",
    }


def _curve(name: str, values: Sequence[float]) -> dict[str, Any]:
    points = curve(values)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [rank for rank, _ in points],
        "y": [values[i] for _, i in points],
        "text": [str(i) for _, i in points],
        "line": {"color": LOADS[name], "width": 2, "dash": DASHES[name]},
        "hovertemplate": f"expert %{{text}}, {name}: %{{y:.3~p}}<extra></extra>",
    }


def _marks(expert: int, shares: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Mark an expert on each curve."""
    marked = {name: values for name, values in shares.items() if expert < len(values)}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"expert {expert}",
        "x": [1 + largest(values, len(values)).index(expert) for values in marked.values()],
        "y": [values[expert] for values in marked.values()],
        "text": list(marked),
        "marker": {"color": expert_colour(expert), "size": 11, "line": {"color": "#ffffff", "width": 1.5}},
        "hovertemplate": f"expert {expert}, %{{text}}: %{{y:.3~p}}<extra></extra>",
    }


def similarity_figure(similarity: Similarity) -> Figure:
    """Draw the cosines between experts as a matrix. Copies share a row and a column."""
    names = [_name(group) for group in similarity.groups]
    cells = [[None if np.isnan(value) else round(float(value), 6) for value in row] for row in similarity.cosines]
    gap = 1 if len(names) <= _MOST_APART else 0
    axis = {"type": "category", "automargin": True, "title": {"text": "expert", "standoff": 12}}
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
                "xgap": gap,
                "ygap": gap,
                "hoverongaps": True,
                "hovertemplate": "experts %{y} and %{x}: cosine %{z}<extra></extra>",
                "colorbar": {"thickness": 12, "outlinewidth": 0},
                **({"texttemplate": "%{z:.3f}", "textfont": {"size": 11}} if len(names) <= _MOST_WRITTEN else {}),
            }
        ],
        "layout": {
            "height": 420,
            "margin": {"l": 60, "r": 20, "t": 20, "b": 60},
            "xaxis": axis,
            "yaxis": {**axis, "autorange": "reversed"},
        },
    }


def _name(group: Group) -> str:
    """Return the ids of a group's experts. If there are many, return the first and the number of others."""
    ids = group.ids
    return ", ".join(map(str, ids)) if len(ids) <= _MOST_LISTED else f"{ids[0]} (+{len(ids) - 1})"


def norm_figure(similarity: Similarity) -> Figure:
    """Draw the norms of experts as bars."""
    return {
        "data": [
            {
                "type": "bar",
                "x": [str(i) for i in similarity.ids],
                "y": [None if np.isnan(norm) else float(norm) for norm in similarity.norms],
                "marker": {"color": [expert_colour(i) for i in similarity.ids]},
                "hovertemplate": "expert %{x}: norm %{y:.6g}<extra></extra>",
            }
        ],
        "layout": {
            "height": 420,
            "margin": {"l": 70, "r": 20, "t": 20, "b": 60},
            "showlegend": False,
            "bargap": 0.2,
            "xaxis": {
                "type": "category",
                "automargin": True,
                "showgrid": False,
                "title": {"text": "expert", "standoff": 12},
            },
            "yaxis": {
                "automargin": True,
                "title": {"text": "norm of the parameters", "standoff": 12},
                "rangemode": "tozero",
            },
        },
    }
