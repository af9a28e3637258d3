"""Convert rings and shares to shapes, colours and texts, for the page and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vraxion_ckpt.checkpoint import ring
from vraxion_ckpt.checkpoint.ring import Ints, Weights
from vraxion_ckpt.reporting.colours import HOT_ARC, NUM_COLOURS, VISITS, expert_colour, text_colour
from vraxion_ckpt.reporting.gather import Hot, Ring, Subject
from vraxion_ckpt.wording import count

# Different dashes keep curves visible where they overlap.
DASHES = {"before": "solid", "predicted": "dash", "measured": "dot", "after": "dash", "now": "solid"}

# Radii. The hot arc is inside the ring of owners, the visits are outside.
_HOT, _INNER, _OUTER, _VISITS, _TALLEST, _ROOM = 0.49, 0.62, 1.0, 1.04, 0.42, 0.06
_THICKNESS = 0.08
# Hot arcs shorter than this, in degrees, are drawn with this length.
_SHORTEST_MARK = 3.0
# The shares of more experts than this are drawn as a curve instead of bars.
MOST_BARS = 32
_MOST_SECTORS = 1440
_MOST_OUTLINED = 360
_MOST_BINS = 720
# Sectors smaller than this part of the ring have no label.
_LABELLED = 1 / 42
# With more experts, the legend lists only those of the split.
_MOST_KEYS = 64


@dataclass(frozen=True)
class Sector:
    """A part of the ring that begins at address `start`.

    Attributes:
        owner: the expert whose colour the sector has.
        owned: the number of the sector's addresses that `owner` owns.
        owners: the number of experts that own addresses in the sector.
    """

    start: int
    length: int
    owner: int
    owned: int
    owners: int


@dataclass(frozen=True)
class Bars:
    """Bars on a circle. All sequences have one entry for each bar.

    Attributes:
        name: the quantity that the bars show.
        base: the radius of the circle.
        heights: the radial length of each bar.
        middles: the angle of each bar's middle in turns (1 = 360°), measured from address 0.
        widths: the angular width of each bar in turns.
        colours: the colours as ``#rrggbb``.
        texts: the text to show when the pointer is on a bar.
        outlined: whether the bars have an outline.
    """

    name: str
    base: float
    heights: Sequence[float]
    middles: Sequence[float]
    widths: Sequence[float]
    colours: Sequence[str]
    texts: Sequence[str]
    outlined: bool = False


@dataclass(frozen=True)
class Label:
    """An expert's id on a sector of the ring.

    Attributes:
        middle: the angle of the sector's middle, in turns.
        width: the angular width of the sector, in turns.
        radius: the distance from the centre.
        colour: the colour of the text.
    """

    expert: int
    middle: float
    width: float
    radius: float
    colour: str


@dataclass(frozen=True)
class KeyEntry:
    """An entry of the legend.

    Attributes:
        number: an expert's id, or empty if the entry is not about an expert.
        text: the meaning of the colour, shown next to the number.
    """

    colour: str
    number: str
    text: str


def ring_bars(one: Ring, hot: Hot | None) -> list[Bars]:
    """Return the bars of a ring: owners, visits if known, and the hot arc if it belongs to a ring of this length."""
    length = len(one.owners)
    parts, _ = sectors(one.owners)
    bars = [
        Bars(
            "owners",
            _INNER,
            [_OUTER - _INNER] * len(parts),
            [(part.start + part.length / 2) / length for part in parts],
            [part.length / length for part in parts],
            [expert_colour(part.owner) for part in parts],
            [hover(part, length) for part in parts],
            outlined=1 < len(parts) <= _MOST_OUTLINED,
        )
    ]
    if one.visits is not None:
        bars.append(_visit_bars(one.visits))
    if hot is not None and hot.arc.ring_len == length:
        arc = hot.arc
        width = max(arc.length / length, _SHORTEST_MARK / 360)
        middle = (arc.start + arc.length / 2) / length
        bars.append(Bars("hot arc", _HOT, [_THICKNESS], [middle], [width], [HOT_ARC], [given_away(hot)]))
    return bars


def _visit_bars(visits: Weights) -> Bars:
    length = len(visits)
    starts, sizes, means = binned(visits)
    top = max(means) or 1.0
    return Bars(
        "visits",
        _VISITS,
        [_TALLEST * mean / top for mean in means],
        [(start + size / 2) / length for start, size in zip(starts, sizes, strict=True)],
        [size / length for size in sizes],
        [VISITS] * len(means),
        [
            f"{mean:,.4g} visits{' per address' if size > 1 else ''}<br>{span(start, size, length)}"
            for start, size, mean in zip(starts, sizes, means, strict=True)
        ],
    )


def ring_labels(one: Ring) -> list[Label]:
    """Return labels for the sectors that are large enough."""
    length = len(one.owners)
    parts, are_arcs = sectors(one.owners)
    return [
        Label(
            part.owner,
            (part.start + part.length / 2) / length,
            part.length / length,
            (_INNER + _OUTER) / 2,
            text_colour(expert_colour(part.owner)),
        )
        for part in parts
        if are_arcs and part.length >= _LABELLED * length
    ]


def ring_radius(*, room: bool) -> float:
    """Return the radius of the whole drawing, including the bars of visits if `room` is set."""
    return _VISITS + (_TALLEST + _ROOM) * room


def ring_ticks(length: int) -> list[int]:
    """Return the addresses to write next to a ring."""
    return sorted({0, length // 4, length // 2, 3 * length // 4})


def given_away(hot: Hot) -> str:
    """Describe the hot arc and the number of its addresses that move."""
    arc = f"hot arc: {span(hot.arc.start, hot.arc.length, hot.arc.ring_len)}"
    verb = "will move" if hot.child is None else "moved"
    return arc + (f", of which {len(hot.addresses):,} {verb}" if len(hot.addresses) < hot.arc.length else f", {verb}")


def sectors(owners: Ints) -> tuple[list[Sector], bool]:
    """Divide a ring into arcs with one owner, or, if there are too many arcs, into equal parts with one colour.

    In each region, an expert's colour is as frequent among the parts as the expert's addresses are. If each part had
    the colour of its most common owner, an expert with slightly more addresses everywhere would fill the ring.

    Returns:
        The sectors, and True if they are arcs.
    """
    starts = ring.arc_starts(owners)
    if len(starts) <= _MOST_SECTORS:
        lengths = ring.run_lengths(starts, len(owners))
        arcs = zip(starts.tolist(), lengths.tolist(), owners[starts].tolist(), strict=True)
        return [Sector(start, length, owner, length, 1) for start, length, owner in arcs], True
    edges = np.linspace(0, len(owners), _MOST_SECTORS + 1).astype(int)
    due = np.zeros(int(owners.max()) + 1, dtype=np.int64)  # by owner: the number of addresses that are not yet drawn
    parts = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        found, counts = np.unique(owners[start:end], return_counts=True)
        due[found] += counts
        shown = int(due[found].argmax())
        due[found[shown]] -= end - start
        parts.append(Sector(start, end - start, int(found[shown]), int(counts[shown]), len(found)))
    return parts, False


def hover(part: Sector, ring_len: int) -> str:
    """Return the text to show when the pointer is on a sector: its owner and its addresses."""
    if part.owners == 1:
        return f"expert {part.owner}<br>{span(part.start, part.length, ring_len)}"
    among = (
        f"expert {part.owner} owns {part.owned:,} of {count(part.length, 'address')}; {part.owners:,} experts own some"
    )
    return f"{among}<br>{span(part.start, part.length, ring_len)}"


def binned(visits: Weights) -> tuple[list[int], list[int], list[float]]:
    """Divide a ring into at most 720 equal parts. Return their starts, lengths and mean visits."""
    edges = np.linspace(0, len(visits), min(_MOST_BINS, len(visits)) + 1).astype(int)
    sums = np.add.reduceat(visits.astype(np.float64), edges[:-1])
    lengths = np.diff(edges)
    return edges[:-1].tolist(), lengths.tolist(), (sums / lengths).tolist()


def span(start: int, length: int, ring_len: int) -> str:
    """Describe an arc, which may wrap around address 0."""
    return f"address {start}" if length == 1 else f"addresses {start}…{(start + length - 1) % ring_len}"


def caption(one: Ring, hot: Hot | None) -> str:
    """Return the main facts about a ring, as sentences."""
    number = len(ring.arc_starts(one.owners))
    first = (
        f"{count(len(one.owners), 'address')} in {count(number, 'arc')}, owned by {count(one.num_experts, 'expert')}"
    )
    if number > _MOST_SECTORS:
        first += f", drawn as {_MOST_SECTORS:,} equal parts whose colours are as frequent as the owned addresses"
    sentences = [first]
    if hot is not None and hot.arc.ring_len == len(one.owners):
        longer = ", drawn longer than it is" if hot.arc.length * 360 < _SHORTEST_MARK * hot.arc.ring_len else ""
        sentences.append(f"{given_away(hot).capitalize()}{longer}")
    if one.visits is not None:
        means = binned(one.visits)[2]
        each = " per address" if len(means) < len(one.visits) else ""
        when = f" (counted {one.counted} the split)" if one.counted else ""
        sentences.append(f"Visits{when}: the tallest bar is {max(means):,.4g}{each}")
    return ". ".join(sentences) + "."


def largest(shares: Sequence[float], most: int) -> list[int]:
    """Return the experts with the largest shares, the largest first."""
    return sorted(range(len(shares)), key=lambda i: (-shares[i], i))[:most]


def curve(shares: Sequence[float]) -> list[tuple[int, int]]:
    """Return pairs of rank and expert for a curve of shares. Rank 1 is the largest share; gaps grow with rank."""
    order = largest(shares, len(shares))
    ranks = np.unique(np.geomspace(1, len(order), _MOST_BINS).round().astype(int)).tolist()
    return [(rank, order[rank - 1]) for rank in ranks]


def key_entries(subject: Subject) -> list[KeyEntry]:
    """Return the legend of the rings' colours. If there are many experts, list only those of the split."""
    if not subject.rings:
        return []
    hot = subject.hot
    roles: dict[int, str] = {}
    if hot is not None:
        roles[hot.parent] = "gives up addresses" if hot.child is None else "gave up addresses"
    if hot is not None and hot.child is not None:
        roles[hot.child] = "got them"
    number = max(one.num_experts for one in subject.rings)
    key = [KeyEntry(expert_colour(i), str(i), "") for i in range(number)] if number <= _MOST_KEYS else []
    key += [KeyEntry(expert_colour(i), str(i), role) for i, role in roles.items()]
    key += [KeyEntry(HOT_ARC, "", "hot arc")] * (hot is not None)
    return key + [KeyEntry(VISITS, "", "visits")] * any(one.visits is not None for one in subject.rings)


def key_note(subject: Subject) -> str:
    """Return a note about repeated colours, or an empty text."""
    number = max((one.num_experts for one in subject.rings), default=0)
    return f"colours repeat every {NUM_COLOURS} experts" if number > NUM_COLOURS else ""
