"""How rings and shares become shapes and colours, whatever draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vraxion_ckpt import ring
from vraxion_ckpt.reporting.gather import Hot, Ring, Subject
from vraxion_ckpt.reporting.words import addresses
from vraxion_ckpt.ring import Ints, Weights

# Colours that people with any kind of colour vision can tell apart, on white and on near-black (after Okabe and Ito).
_STRONG = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c7a00", "#7a5bb5", "#4d9221", "#999999")
# Of many experts no two need be told apart but neighbours, and those of the split.
_MUTED = ("#8fa8bd", "#c3b48f", "#93b3a4", "#bda0b0", "#a9a9a9", "#b8c4ce")
PARENT, CHILD, HOT = "#d55e00", "#0072b2", "#e8308c"
VISITS = "#7f7f7f"
LOADS = {"before": "#999999", "predicted": "#e69f00", "measured": "#009e73", "after": "#0072b2", "now": "#0072b2"}

_MOST_SECTORS = 1440
_MOST_BINS = 720


@dataclass(frozen=True)
class Sector:
    """A part of the ring, from address `start` on.

    Attributes:
        owners: how many different experts own something of it; 1 for an arc.
    """

    start: int
    length: int
    owner: int
    owners: int


def colour(expert: int, num_experts: int, hot: Hot | None) -> str:
    """Return an expert's colour; those of a split stand out."""
    if hot is not None and expert == hot.parent:
        return PARENT
    if hot is not None and expert == hot.child:
        return CHILD
    others = [c for c in _STRONG if hot is None or c not in (PARENT, CHILD)]
    return others[expert % len(others)] if num_experts <= len(_STRONG) else _MUTED[expert % len(_MUTED)]


def sectors(owners: Ints) -> tuple[list[Sector], bool]:
    """Return a ring as arcs of one owner each; too many to be seen become equal parts, each with its commonest owner.

    Returns:
        The sectors, and whether they are arcs.
    """
    arcs = ring.arcs(owners)
    if len(arcs) <= _MOST_SECTORS:
        return [Sector(start, length, owner, 1) for start, length, owner in arcs], True
    edges = np.linspace(0, len(owners), _MOST_SECTORS + 1).astype(int)
    parts = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        found, counts = np.unique(owners[start:end], return_counts=True)
        parts.append(Sector(start, end - start, int(found[counts.argmax()]), len(found)))
    return parts, False


def binned(visits: Weights) -> tuple[list[int], list[int], list[float]]:
    """Return starts, lengths and mean visits of at most 720 equal parts of a ring."""
    edges = np.linspace(0, len(visits), min(_MOST_BINS, len(visits)) + 1).astype(int)
    sums = np.add.reduceat(visits.astype(np.float64), edges[:-1])
    lengths = np.diff(edges)
    return edges[:-1].tolist(), lengths.tolist(), (sums / lengths).tolist()


def span(start: int, length: int, ring_len: int) -> str:
    """Return an arc for people; it may wrap."""
    return f"address {start}" if length == 1 else f"addresses {start}…{(start + length - 1) % ring_len}"


def caption(one: Ring) -> str:
    """Tell a ring's main facts."""
    parts, are_arcs = sectors(one.owners)
    if are_arcs:
        told = f"{addresses(len(one.owners))} in {len(parts):,} arc{'s' * (len(parts) != 1)} of one owner"
    else:
        told = (
            f"{addresses(len(one.owners))} in {len(ring.arcs(one.owners)):,} arcs, drawn as {len(parts):,} equal "
            "parts in the colour of the commonest owner"
        )
    return f"{told}; {one.num_experts:,} expert{'s' * (one.num_experts != 1)}"


def largest(shares: Sequence[float], most: int) -> list[int]:
    """Return the experts with the largest shares, the largest first."""
    return sorted(range(len(shares)), key=lambda i: (-shares[i], i))[:most]


def named_colours(subject: Subject) -> list[tuple[str, str]]:
    """Return what stands in a key: of few experts each one's colour, of many those of the split."""
    if not subject.rings:
        return []
    last = subject.rings[-1]
    if last.num_experts <= len(_STRONG):
        key = [(colour(i, last.num_experts, subject.hot), f"expert {i}") for i in range(last.num_experts)]
    else:
        split = ((subject.hot.parent, "gave away"), (subject.hot.child, "got them")) if subject.hot else ()
        key = [
            (colour(i, last.num_experts, subject.hot), f"expert {i}, which {what}")
            for i, what in split
            if i is not None
        ]
    key += [(HOT, "hot arc")] * (subject.hot is not None)
    return key + [(VISITS, "visits")] * any(one.visits is not None for one in subject.rings)
