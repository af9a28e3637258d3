"""How rings and shares become shapes and colours, whatever draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vraxion_ckpt.checkpoint import ring
from vraxion_ckpt.checkpoint.ring import Ints, Weights
from vraxion_ckpt.reporting.gather import Hot, Ring, Subject
from vraxion_ckpt.wording import count

# Colours that people with any kind of colour vision can tell apart, on white and on near-black (after Okabe and Ito).
_STRONG = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c7a00", "#7a5bb5", "#4d9221", "#999999")
# Of many experts no two need be told apart but neighbours, and those of the split.
_MUTED = ("#8fa8bd", "#c3b48f", "#93b3a4", "#bda0b0", "#a9a9a9", "#b8c4ce")
PARENT, CHILD, HOT = "#d55e00", "#0072b2", "#e8308c"
VISITS = "#7f7f7f"
LOADS = {"before": "#999999", "predicted": "#e69f00", "measured": "#009e73", "after": "#0072b2", "now": "#0072b2"}
# Curves may lie on each other.
DASHES = {"before": "solid", "predicted": "dash", "measured": "dot", "after": "dash", "now": "solid"}

# The radii of what a ring is drawn with: the hot arc inside the owners, the visits outside.
_HOT, _INNER, _OUTER, _VISITS, _TALLEST, _ROOM = 0.49, 0.62, 1.0, 1.04, 0.42, 0.06
_THICKNESS = 0.08
# A hot arc that is shorter than so many degrees is marked as long as that.
_SHORTEST_MARK = 3.0
# Shares of more experts are a curve.
MOST_BARS = 32
_MOST_SECTORS = 1440
_MOST_OUTLINED = 360
_MOST_BINS = 720


@dataclass(frozen=True)
class Sector:
    """A part of the ring, from address `start` on.

    Attributes:
        owner: the expert in whose colour it is drawn.
        owned: how many of its addresses that expert owns; all of an arc.
        owners: how many different experts own something of it; 1 for an arc.
    """

    start: int
    length: int
    owner: int
    owned: int
    owners: int


@dataclass(frozen=True)
class Bars:
    """Bars that stand on a circle.

    Attributes:
        name: what they show.
        base: the radius of the circle.
        heights: of each, above it.
        middles: where each stands, in turns from address 0 on.
        widths: of each, in turns.
        colours: of each.
        texts: what is told of each.
        outlined: whether they are few enough for a line around each.
    """

    name: str
    base: float
    heights: Sequence[float]
    middles: Sequence[float]
    widths: Sequence[float]
    colours: Sequence[str]
    texts: Sequence[str]
    outlined: bool = False


def ring_bars(one: Ring, hot: Hot | None, num_colours: int) -> list[Bars]:
    """Return what a ring is drawn with: owners, visits if there are, and the hot arc if it is one of this ring."""
    length = len(one.owners)
    shown = hot if hot is not None and hot.arc.ring_len == length else None
    parts, _ = sectors(one.owners)
    bars = [
        Bars(
            "owners",
            _INNER,
            [_OUTER - _INNER] * len(parts),
            [(part.start + part.length / 2) / length for part in parts],
            [part.length / length for part in parts],
            [colour(part.owner, num_colours, shown) for part in parts],
            [hover(part, length) for part in parts],
            outlined=1 < len(parts) <= _MOST_OUTLINED,
        )
    ]
    if one.visits is not None:
        starts, lengths, means = binned(one.visits)
        top = max(means) or 1.0
        bars.append(
            Bars(
                "visits",
                _VISITS,
                [_TALLEST * mean / top for mean in means],
                [(start + size / 2) / length for start, size in zip(starts, lengths, strict=True)],
                [size / length for size in lengths],
                [VISITS] * len(means),
                [
                    f"{mean:,.4g} visits{' an address' if size > 1 else ''}<br>{span(start, size, length)}"
                    for start, size, mean in zip(starts, lengths, means, strict=True)
                ],
            )
        )
    if shown is not None:
        arc = shown.arc
        width = max(arc.length / length, _SHORTEST_MARK / 360)
        middle = (arc.start + arc.length / 2) / length
        bars.append(Bars("hot arc", _HOT, [_THICKNESS], [middle], [width], [HOT], [given_away(shown)]))
    return bars


def ring_radius(*, room: bool) -> float:
    """Return how far out a ring is drawn, with room for visits or without."""
    return _VISITS + (_TALLEST + _ROOM) * room


def ring_ticks(length: int) -> list[int]:
    """Return the addresses whose numbers stand at a ring."""
    return sorted({0, length // 4, length // 2, 3 * length // 4})


def colour(expert: int, num_experts: int, hot: Hot | None) -> str:
    """Return an expert's colour; those of a split stand out."""
    if hot is not None and expert == hot.parent:
        return PARENT
    if hot is not None and expert == hot.child:
        return CHILD
    others = [c for c in _STRONG if hot is None or c not in (PARENT, CHILD)]
    return others[expert % len(others)] if num_experts <= len(_STRONG) else _MUTED[expert % len(_MUTED)]


def given_away(hot: Hot) -> str:
    """Tell the hot arc, and how much of it is, or was, given away."""
    told = f"hot arc: {span(hot.arc.start, hot.arc.length, hot.arc.ring_len)}"
    when = "to be given away" if hot.child is None else "given away"
    return told + (f", {len(hot.addresses):,} of them {when}" if len(hot.addresses) < hot.arc.length else f", {when}")


def palette(subject: Subject) -> int:
    """Return for how many experts there must be colours: the same ones before and after."""
    return max((one.num_experts for one in subject.rings), default=0)


def sectors(owners: Ints) -> tuple[list[Sector], bool]:
    """Return a ring as arcs of one owner each; too many to be seen become equal parts of one colour each.

    The colours are as frequent as what the experts own, also nearby: were each part in that of its commonest owner, an
    expert who owns a little more than others everywhere would seem to own the ring.

    Returns:
        The sectors, and whether they are arcs.
    """
    if number_of_arcs(owners) <= _MOST_SECTORS:
        return [Sector(start, length, owner, length, 1) for start, length, owner in ring.arcs(owners)], True
    edges = np.linspace(0, len(owners), _MOST_SECTORS + 1).astype(int)
    due = np.zeros(int(owners.max()) + 1, dtype=np.int64)  # addresses whose colour was not shown yet
    parts = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        found, counts = np.unique(owners[start:end], return_counts=True)
        due[found] += counts
        shown = int(due[found].argmax())
        due[found[shown]] -= end - start
        parts.append(Sector(start, end - start, int(found[shown]), int(counts[shown]), len(found)))
    return parts, False


def number_of_arcs(owners: Ints) -> int:
    """Count the arcs of one owner each, going round the ring."""
    return max(1, int(np.count_nonzero(owners != np.roll(owners, 1))))


def hover(part: Sector, ring_len: int) -> str:
    """Tell whose a part of a ring is, and which part."""
    if part.owners == 1:
        return f"expert {part.owner}<br>{span(part.start, part.length, ring_len)}"
    among = (
        f"expert {part.owner}, of {part.owners:,} experts here, owns {part.owned:,} of {count(part.length, 'address')}"
    )
    return f"{among}<br>{span(part.start, part.length, ring_len)}"


def binned(visits: Weights) -> tuple[list[int], list[int], list[float]]:
    """Return starts, lengths and mean visits of at most 720 equal parts of a ring."""
    edges = np.linspace(0, len(visits), min(_MOST_BINS, len(visits)) + 1).astype(int)
    sums = np.add.reduceat(visits.astype(np.float64), edges[:-1])
    lengths = np.diff(edges)
    return edges[:-1].tolist(), lengths.tolist(), (sums / lengths).tolist()


def span(start: int, length: int, ring_len: int) -> str:
    """Return an arc for people; it may wrap."""
    return f"address {start}" if length == 1 else f"addresses {start}…{(start + length - 1) % ring_len}"


def caption(one: Ring, hot: Hot | None) -> str:
    """Tell a ring's main facts."""
    number = number_of_arcs(one.owners)
    told = [f"{count(len(one.owners), 'address')} in {count(number, 'arc')} of one owner"]
    if number > _MOST_SECTORS:
        told[0] += f", drawn as {_MOST_SECTORS:,} equal parts, whose colours are as frequent as what their owners own"
    told.append(count(one.num_experts, "expert"))
    if hot is not None and hot.arc.ring_len == len(one.owners):
        longer = ", marked longer than it is" if hot.arc.length * 360 < _SHORTEST_MARK * hot.arc.ring_len else ""
        told.append(f"{given_away(hot)}{longer}")
    if one.visits is not None:
        means = binned(one.visits)[2]
        each = " an address" if len(means) < len(one.visits) else ""
        told.append(f"visits{f' counted {one.counted}' * bool(one.counted)}, the tallest bar {max(means):,.4g}{each}")
    return "; ".join(told)


def largest(shares: Sequence[float], most: int) -> list[int]:
    """Return the experts with the largest shares, the largest first."""
    return sorted(range(len(shares)), key=lambda i: (-shares[i], i))[:most]


def curve(shares: Sequence[float]) -> list[tuple[int, int]]:
    """Return ranks and experts of a curve of shares, the largest first: the first ones each, then ever fewer."""
    order = largest(shares, len(shares))
    ranks = np.unique(np.geomspace(1, len(order), _MOST_BINS).round().astype(int)).tolist()
    return [(rank, order[rank - 1]) for rank in ranks]


def named_colours(subject: Subject) -> list[tuple[str, str]]:
    """Return what stands in a key: of few experts each one's colour, of many those of the split."""
    if not subject.rings:
        return []
    number = palette(subject)
    if number <= len(_STRONG):
        key = [(colour(i, number, subject.hot), f"expert {i}") for i in range(number)]
    else:
        gave = "gives up addresses" if subject.hot and subject.hot.child is None else "gave up addresses"
        split = ((subject.hot.parent, gave), (subject.hot.child, "got them")) if subject.hot else ()
        key = [(colour(i, number, subject.hot), f"expert {i}, which {what}") for i, what in split if i is not None]
    key += [(HOT, "hot arc")] * (subject.hot is not None)
    return key + [(VISITS, "visits")] * any(one.visits is not None for one in subject.rings)
