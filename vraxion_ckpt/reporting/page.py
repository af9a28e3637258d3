"""Render the HTML page as one self-contained file that fetches nothing from the network."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from vraxion_ckpt._version import __version__
from vraxion_ckpt.printable import printable
from vraxion_ckpt.reporting.colours import text_colour
from vraxion_ckpt.reporting.drawing import caption, key_entries, key_note, largest
from vraxion_ckpt.reporting.experts_section import experts_section
from vraxion_ckpt.reporting.figures import Drawn, ring_figure, share_figure
from vraxion_ckpt.reporting.gather import Subject
from vraxion_ckpt.reporting.words import percent
from vraxion_ckpt.wording import listed

_MOST_ROWS = 12
_MOST_CHANGES = 40
# Words longer than this may be broken after a separator.
_LONG = 16
_AFTER_SEPARATOR = re.compile(r"(?<=[/\\._:=-])(?=[^/\\._:=-])")


def render(subject: Subject) -> str:
    """Return the page as HTML, from the template `page.html`."""
    rings, shares, experts = _rings(subject), _shares(subject), experts_section(subject)
    drawn = [*rings, *shares, *(experts.figures if experts else ())]
    return _template().render(
        subject=subject,
        rings=rings,
        key=key_entries(subject),
        key_note=key_note(subject),
        shares=shares,
        loads=_loads(subject),
        experts=experts,
        lifecycle=_lifecycle(subject),
        most_changes=_MOST_CHANGES,
        history=_history(subject),
        figures={one.name: one.figure for one in drawn},
        plotly_js=Markup(get_plotlyjs()),
        version=__version__,
    )


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("vraxion_ckpt.reporting", ""),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters |= {"breakable": _breakable, "text_colour": text_colour}
    return environment.get_template("page.html")


def _breakable(value: object) -> Markup:
    """Return a text as HTML that allows line breaks after separators in long words, such as paths."""
    words = re.split(r"(\s+)", printable(str(value)))
    return Markup("").join(Markup("<wbr>").join(_AFTER_SEPARATOR.split(w)) if len(w) > _LONG else w for w in words)


def _rings(subject: Subject) -> list[Drawn]:
    room = any(one.visits is not None for one in subject.rings)
    return [
        Drawn(
            f"ring-{number}",
            ring_figure(one, subject.hot, room=room),
            one.title.capitalize(),
            caption(one, subject.hot),
        )
        for number, one in enumerate(subject.rings)
    ]


def _shares(subject: Subject) -> list[Drawn]:
    if not subject.shares:
        return []
    latest_name, latest = list(subject.shares.items())[-1]
    top = listed([f"expert {i} {percent(latest[i])}" for i in largest(latest, len(latest))], 3)
    largest_shares = f"Largest shares, {latest_name}: {top}"
    return [Drawn("shares", share_figure(subject.shares, subject.shares_of, subject.hot), "", largest_shares)]


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
