"""The page around the figures: one file that needs nothing else, and asks nobody for anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from math import isfinite
from typing import Any

from plotly.offline import get_plotlyjs

from vraxion_ckpt._version import __version__
from vraxion_ckpt.printable import printable
from vraxion_ckpt.reporting.drawing import caption, largest, named_colours, palette
from vraxion_ckpt.reporting.figures import Figure, norm_figure, ring_figure, share_figure, similarity_figure
from vraxion_ckpt.reporting.gather import Alike, Subject
from vraxion_ckpt.reporting.words import percent
from vraxion_ckpt.wording import count, listed, numbered

_MOST_ROWS = 12
_MOST_CHANGES = 40
# Nothing may be fetched, whatever a checkpoint holds.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def render(subject: Subject) -> str:
    """Return the page as HTML."""
    figures: dict[str, Figure] = {}
    body = [
        f"<h1>{_shown(subject.name)}</h1>",
        f'<p class="headline">{_shown(subject.headline)}</p>',
        _table(("", ""), subject.facts),
        *_rings(subject, figures),
        *_shares(subject, figures),
        *_alike(subject, figures),
        *_lifecycle(subject),
        *_changes(subject),
        *_history(subject),
        f'<p class="note">vraxion-ckpt {_shown(__version__)}</p>',
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_shown(subject.name)}</title>",
            f"<style>{_asset('page.css')}</style></head><body><main>",
            *body,
            "</main>",
            f'<script type="application/json" id="figures">{_embedded(figures)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{_asset('page.js')}</script>",
            "</body></html>",
        ]
    )


def _shown(text: str) -> str:
    """Return a text as HTML; what would turn its direction round, or cannot be seen, is spelt out."""
    return escape(printable(text))


def _asset(name: str) -> str:
    return resources.files("vraxion_ckpt.reporting").joinpath(name).read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
    """Return JSON that ends no script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _section(title: str, *content: str) -> list[str]:
    return [f"<section><h2>{_shown(title)}</h2>", *content, "</section>"] if any(content) else []


def _note(text: str) -> str:
    return f'<p class="note">{_shown(text)}</p>'


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    def row(tag: str, cells: Sequence[object]) -> str:
        classes = ['class="n"' if place in numbers else "" for place in range(len(cells))]
        inner = "".join(f"<{tag} {kind}>{_shown(str(cell))}</{tag}>" for kind, cell in zip(classes, cells, strict=True))
        return f"<tr>{inner}</tr>"

    head = f"<thead>{row('th', headings)}</thead>" if any(headings) else ""
    body = "".join(row("td", cells) for cells in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _figure(figures: dict[str, Figure], name: str, figure: Figure, title: str, told: str) -> str:
    figures[name] = figure
    heading = f"<h3>{_shown(title)}</h3>" if title else ""
    return f'<figure>{heading}<div id="{name}"></div><figcaption>{_shown(told)}</figcaption></figure>'


def _rings(subject: Subject, figures: dict[str, Figure]) -> list[str]:
    if not subject.rings:
        return _section("The ring", _note("The model has no router map, or no head whose experts it could name."))
    room = any(one.visits is not None for one in subject.rings)
    drawn = [
        _figure(
            figures,
            f"ring-{number}",
            ring_figure(one, subject.hot, palette(subject), room=room),
            one.title,
            caption(one, subject.hot),
        )
        for number, one in enumerate(subject.rings)
    ]
    return _section("The ring", _key(subject), f'<div class="pair">{"".join(drawn)}</div>')


def _key(subject: Subject) -> str:
    spans = "".join(
        f'<span><i style="background:{tone}"></i>{_shown(name)}</span>' for tone, name in named_colours(subject)
    )
    return f'<div class="key">{spans}</div>'


def _shares(subject: Subject, figures: dict[str, Figure]) -> list[str]:
    if not subject.shares:
        return []
    latest_name, latest = list(subject.shares.items())[-1]
    top = listed([f"expert {i} {percent(latest[i])}" for i in largest(latest, len(latest))], 3)
    told = f"{latest_name}: {top}"
    figure = share_figure(subject.shares, subject.shares_of, subject.hot)
    parts = [_figure(figures, "shares", figure, "", told)]
    if subject.signs is not None:
        before = "now" if "now" in subject.shares else "before"
        signs = subject.signs
        loads = ((before, signs.before), ("predicted", signs.predicted), ("measured", signs.measured))
        rows = [
            (name, percent(load.max_share), f"{load.entropy:.3f}", f"{load.active:,} of {len(load.shares):,}")
            for name, load in loads
            if load
        ]
        parts.append(_table(("", "ptr_expert_max_share", "entropy", "experts visited"), rows, (1, 2, 3)))
    return _section(f"Shares of {subject.shares_of}", *parts)


def _alike(subject: Subject, figures: dict[str, Figure]) -> list[str]:
    alike = subject.alike
    if alike is None:
        return _section("Experts", _note("The model has no head with tensors."))
    figure = norm_figure(alike, palette(subject) or subject.num_experts, subject.hot)
    drawn = [_figure(figures, "norms", figure, "norms", _told_of_norms(subject, alike))]
    if len(alike.ids) > 1:
        told = _told_of_cosines(subject, alike)
        drawn.insert(0, _figure(figures, "similarity", similarity_figure(alike), "similarity", told))
    gone = f"Deleted, and without tensors: {numbered('expert', sorted(subject.deleted))}." if subject.deleted else ""
    return _section("Experts", f'<div class="pair">{"".join(drawn)}</div>', _note(gone) if gone else "")


def _told_of_norms(subject: Subject, alike: Alike) -> str:
    finite = [(norm, i) for i, norm in zip(alike.ids, alike.norms.tolist(), strict=True) if isfinite(norm)]
    told = [f"Norms of {_scope(subject, alike)}"]
    if len(finite) == 1:
        told.append(f"expert {finite[0][1]}: {finite[0][0]:.4g}")
    elif finite:
        (low, least), (high, most) = min(finite), max(finite)
        told.append(f"from {low:.4g} of expert {least} to {high:.4g} of expert {most}")
    odd = [i for i, norm in zip(alike.ids, alike.norms.tolist(), strict=True) if not isfinite(norm)]
    if odd:
        told.append(
            f"not a number: {numbered('expert', odd)}, of which an entry is not finite, or cannot be calculated with"
        )
    return "; ".join(told)


def _told_of_cosines(subject: Subject, alike: Alike) -> str:
    cosines = alike.cosines.tolist()
    pairs = [(cosines[a][b], a, b) for a in range(len(cosines)) for b in range(a + 1, len(cosines))]
    told = [f"Cosines between {_scope(subject, alike)}"]
    split = (subject.hot.parent, subject.hot.child) if subject.hot else ()
    places = [alike.ids.index(i) for i in split if i in alike.ids]
    if len(places) == 2:
        a, b = places
        told.append(_cosine(alike, cosines[a][b], a, b, "those of the split"))
    known = [pair for pair in pairs if isfinite(pair[0])]
    if known and sorted(places) != list(max(known)[1:]):
        value, a, b = max(known)
        told.append(_cosine(alike, value, a, b, "the most alike"))
    if len(known) < len(pairs):
        told.append("a gap where shapes differ, a norm is not a number, or all entries are zero")
    return "; ".join(told)


def _cosine(alike: Alike, value: float, a: int, b: int, which: str) -> str:
    return f"{which}, {alike.ids[a]} and {alike.ids[b]}: {value:.4f}" if isfinite(value) else f"{which}: not a number"


def _scope(subject: Subject, alike: Alike) -> str:
    present = subject.num_experts - len(subject.deleted)
    if len(alike.ids) < present:
        return f"{len(alike.ids)} of {present:,} experts, those of the split and of the largest shares"
    return count(present, "expert")


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
    return _section("Lifecycle", table, _note(f"… and {more:,} more") if more > 0 else "") if rows else []


def _changes(subject: Subject) -> list[str]:
    more = len(subject.changes) - _MOST_CHANGES
    note = _note(f"… and {more:,} lines more, which diff tells") if more > 0 else ""
    return _section("What changed", _table(("", ""), subject.changes[:_MOST_CHANGES]), note) if subject.changes else []


def _history(subject: Subject) -> list[str]:
    rows = [
        (record.name, f"{record.distribution} {record.version}", record.source, record.summary)
        for record in subject.history[-_MOST_CHANGES:]
    ]
    more = len(subject.history) - len(rows)
    note = _note(f"{more:,} earlier steps, and then:") if more else ""
    return _section("History", note, _table(("step", "from", "on", "what it did"), rows)) if rows else []
