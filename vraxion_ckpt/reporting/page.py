"""The page around the figures: one file that needs nothing else, and asks nobody for anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from vraxion_ckpt._version import __version__
from vraxion_ckpt.reporting.drawing import caption, largest, named_colours
from vraxion_ckpt.reporting.figures import Figure, norm_figure, ring_figure, share_figure, similarity_figure
from vraxion_ckpt.reporting.gather import MOST_COMPARED, Subject
from vraxion_ckpt.reporting.words import percent

_MOST_ROWS = 12
# Nothing may be fetched, whatever a checkpoint holds.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def render(subject: Subject) -> str:
    """Return the page as HTML."""
    figures: dict[str, Figure] = {}
    body = [
        f"<h1>{escape(subject.name)}</h1>",
        f'<p class="headline">{escape(subject.headline)}</p>',
        _table(("", ""), subject.facts),
        *_rings(subject, figures),
        *_shares(subject, figures),
        *_alike(subject, figures),
        *_lifecycle(subject),
        *_section("What changed", _table(("", ""), subject.changes) if subject.changes else ""),
        *_history(subject),
        f'<p class="note">vraxion-ckpt {escape(__version__)}</p>',
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(subject.name)}</title>",
            f"<style>{_asset('page.css')}</style></head><body><main>",
            *body,
            "</main>",
            f'<script type="application/json" id="figures">{_embedded(figures)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{_asset('page.js')}</script>",
            "</body></html>",
        ]
    )


def _asset(name: str) -> str:
    return resources.files("vraxion_ckpt.reporting").joinpath(name).read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
    """Return JSON that ends no script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _section(title: str, *content: str) -> list[str]:
    return [f"<section><h2>{escape(title)}</h2>", *content, "</section>"] if any(content) else []


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    def row(tag: str, cells: Sequence[object]) -> str:
        classes = ['class="n"' if place in numbers else "" for place in range(len(cells))]
        inner = "".join(f"<{tag} {kind}>{escape(str(cell))}</{tag}>" for kind, cell in zip(classes, cells, strict=True))
        return f"<tr>{inner}</tr>"

    head = f"<thead>{row('th', headings)}</thead>" if any(headings) else ""
    body = "".join(row("td", cells) for cells in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _figure(figures: dict[str, Figure], name: str, figure: Figure, title: str, told: str) -> str:
    figures[name] = figure
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<figure>{heading}<div id="{name}"></div><figcaption>{escape(told)}</figcaption></figure>'


def _rings(subject: Subject, figures: dict[str, Figure]) -> list[str]:
    if not subject.rings:
        return _section("The ring", '<p class="note">The model has no router map.</p>')
    drawn = [
        _figure(figures, f"ring-{number}", ring_figure(one, subject.hot), one.title, caption(one))
        for number, one in enumerate(subject.rings)
    ]
    return _section("The ring", _key(subject), f'<div class="pair">{"".join(drawn)}</div>')


def _key(subject: Subject) -> str:
    spans = "".join(
        f'<span><i style="background:{tone}"></i>{escape(name)}</span>' for tone, name in named_colours(subject)
    )
    return f'<div class="key">{spans}</div>'


def _shares(subject: Subject, figures: dict[str, Figure]) -> list[str]:
    if not subject.shares:
        return []
    latest_name, latest = list(subject.shares.items())[-1]
    top = ", ".join(f"expert {i} {percent(latest[i])}" for i in largest(latest, 3))
    told = f"{latest_name}: {top}{', …' if len(latest) > 3 else ''}"
    parts = [_figure(figures, "shares", share_figure(subject.shares, subject.shares_of), "", told)]
    if subject.signs is not None:
        loads = (("before", subject.signs.before), ("predicted", subject.signs.predicted))
        rows = [
            (name, percent(load.max_share), f"{load.entropy:.3f}", f"{load.active:,} of {len(load.shares):,}")
            if load
            else (name, "–", "–", "–")
            for name, load in (*loads, ("measured", subject.signs.measured))
        ]
        parts.append(_table(("", "ptr_expert_max_share", "entropy", "experts visited"), rows, (1, 2, 3)))
    return _section(f"Shares of {subject.shares_of}", *parts)


def _alike(subject: Subject, figures: dict[str, Figure]) -> list[str]:
    alike = subject.alike
    if alike is None:
        return _section("Experts", '<p class="note">The model has no head with tensors.</p>')
    number = subject.rings[-1].num_experts if subject.rings else len(alike.ids)
    which = f"those of the split and of the largest shares, {len(alike.ids)} of {number:,}"
    all_of_them = f"all {len(alike.ids)} experts" if len(alike.ids) > 1 else "the one expert"
    scope = which if len(alike.ids) == MOST_COMPARED < number else all_of_them
    odd = int(np.isnan(alike.norms).sum())
    norms = f"Norm{'s' * (len(alike.ids) > 1)} of {scope}" + (
        f"; {odd} hold what is not a finite number" if odd else ""
    )
    drawn = [_figure(figures, "norms", norm_figure(alike, number, subject.hot), "norms", norms)]
    if len(alike.ids) > 1:
        told = f"Cosines between {scope}; a gap where shapes differ, or an entry is not a finite number"
        drawn.insert(0, _figure(figures, "similarity", similarity_figure(alike), "similarity", told))
    return _section("Experts", f'<div class="pair">{"".join(drawn)}</div>')


def _lifecycle(subject: Subject) -> list[str]:
    split = (subject.hot.parent, subject.hot.child) if subject.hot else ()
    first = [i for i in split if i is not None and i in subject.lifecycle]
    shown = sorted(list(dict.fromkeys([*first, *subject.lifecycle]))[:_MOST_ROWS])
    rows = [
        (
            f"{i}{' (deleted)' if i in subject.deleted else ''}",
            f"{row.contrib:g}" if abs(row.contrib) < 10**15 else "huge",
            row.created_step,
            row.last_used_step,
            "yes" if row.tenured else "no",
        )
        for i, row in ((i, subject.lifecycle[i]) for i in shown)
    ]
    more = len(subject.lifecycle) - len(rows)
    table = _table(("expert", "contrib", "created at step", "last used at step", "tenured"), rows, (1, 2, 3))
    note = f'<p class="note">… and {more:,} more</p>' if more > 0 else ""
    return _section("Lifecycle", table, note) if rows else []


def _history(subject: Subject) -> list[str]:
    rows = [
        (record.name, f"{record.distribution} {record.version}", record.source, record.summary)
        for record in subject.history
    ]
    return _section("History", _table(("step", "from", "on", "what it did"), rows)) if rows else []
