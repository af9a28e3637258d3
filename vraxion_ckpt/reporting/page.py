"""The page around the figures: one file that needs nothing else, and fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from vraxion_ckpt._version import __version__
from vraxion_ckpt.printable import printable
from vraxion_ckpt.reporting.drawing import caption, largest, named_colours, palette
from vraxion_ckpt.reporting.figures import Figure, norm_figure, ring_figure, share_figure, similarity_figure
from vraxion_ckpt.reporting.gather import Alike, Subject
from vraxion_ckpt.reporting.words import experts, percent

_MOST_ROWS = 12
_MOST_CHANGES = 40
_MOST_NAMED = 8


@dataclass(frozen=True)
class Drawn:
    """A figure as the page shows it.

    Attributes:
        name: the identifier of its element.
    """

    name: str
    figure: Figure
    title: str
    caption: str


def render(subject: Subject) -> str:
    """Return the page as HTML; `page.html` is its template."""
    rings, shares, alike = _rings(subject), _shares(subject), _alike(subject)
    return _page().render(
        subject=subject,
        rings=rings,
        colours=named_colours(subject),
        shares=shares,
        loads=_loads(subject),
        experts=alike,
        deleted=_named(sorted(subject.deleted)) if subject.deleted else "",
        lifecycle=_lifecycle(subject),
        most_changes=_MOST_CHANGES,
        history=_history(subject),
        figures={drawn.name: drawn.figure for drawn in (*rings, *shares, *alike)},
        plotly_js=Markup(get_plotlyjs()),
        version=__version__,
    )


def _page() -> Template:
    environment = Environment(
        loader=PackageLoader("vraxion_ckpt.reporting", ""),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.get_template("page.html")


def _rings(subject: Subject) -> list[Drawn]:
    room = any(one.visits is not None for one in subject.rings)
    return [
        Drawn(
            f"ring-{number}",
            ring_figure(one, subject.hot, palette(subject), room=room),
            one.title,
            caption(one, subject.hot),
        )
        for number, one in enumerate(subject.rings)
    ]


def _shares(subject: Subject) -> list[Drawn]:
    if not subject.shares:
        return []
    latest_name, latest = list(subject.shares.items())[-1]
    top = ", ".join(f"expert {i} {percent(latest[i])}" for i in largest(latest, 3))
    told = f"{latest_name}: {top}{', …' if len(latest) > 3 else ''}"
    return [Drawn("shares", share_figure(subject.shares, subject.shares_of, subject.hot), "", told)]


def _loads(subject: Subject) -> list[tuple[str, ...]]:
    if subject.signs is None:
        return []
    before = "now" if "now" in subject.shares else "before"
    signs = subject.signs
    loads = ((before, signs.before), ("predicted", signs.predicted), ("measured", signs.measured))
    return [
        (name, percent(load.max_share), f"{load.entropy:.3f}", f"{load.active:,} of {len(load.shares):,}")
        for name, load in loads
        if load
    ]


def _alike(subject: Subject) -> list[Drawn]:
    alike = subject.alike
    if alike is None:
        return []
    figure = norm_figure(alike, palette(subject) or subject.num_experts, subject.hot)
    drawn = [Drawn("norms", figure, "norms", _told_of_norms(subject, alike))]
    if len(alike.ids) > 1:
        told = _told_of_cosines(subject, alike)
        drawn.insert(0, Drawn("similarity", similarity_figure(alike), "similarity", told))
    return drawn


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
        told.append(f"not a number: {_named(odd)}, of which an entry is not finite, or cannot be calculated with")
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
    return experts(present)


def _named(ids: Sequence[int]) -> str:
    """Name experts, of many only the first ones."""
    more = f" and {len(ids) - _MOST_NAMED:,} more" if len(ids) > _MOST_NAMED else ""
    return f"expert{'s' * (len(ids) != 1)} {', '.join(map(str, ids[:_MOST_NAMED]))}{more}"


def _lifecycle(subject: Subject) -> list[tuple[object, ...]]:
    split = (subject.hot.parent, subject.hot.child) if subject.hot else ()
    first = [i for i in split if i is not None and i in subject.lifecycle]
    shown = sorted(list(dict.fromkeys([*first, *subject.lifecycle]))[:_MOST_ROWS])
    return [
        (
            f"{i}{' (deleted)' if i in subject.deleted else ''}",
            f"{row.contrib:g}" if abs(row.contrib) < 10**15 else "huge",
            row.created_step,
            row.last_used_step,
            "yes" if row.tenured else "no",
        )
        for i, row in ((i, subject.lifecycle[i]) for i in shown)
    ]


def _history(subject: Subject) -> list[tuple[object, ...]]:
    return [
        (record.name, f"{record.distribution} {record.version}", record.source, record.summary)
        for record in subject.history[-_MOST_CHANGES:]
    ]
