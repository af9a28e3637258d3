"""What a report shows, gathered from checkpoints: rings, loads, experts, and what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vraxion_ckpt import progress, ring
from vraxion_ckpt.balance import Signs
from vraxion_ckpt.invariants import router_owners
from vraxion_ckpt.model import Checkpoint, Expert, HeadKind, Lifecycle, Record
from vraxion_ckpt.plain import as_numbers
from vraxion_ckpt.reporting.words import addresses, percent
from vraxion_ckpt.ring import Arc, Ints, Weights

# A matrix of more is no picture any more.
MOST_COMPARED = 64
_PIECE = 2**16


@dataclass(frozen=True)
class Ring:
    """One router map, and what was counted on it."""

    title: str
    owners: Ints
    num_experts: int
    visits: Weights | None


@dataclass(frozen=True)
class Hot:
    """Which addresses are, or were, given away.

    Attributes:
        child: who got them; None if that is only planned.
        arc: the shortest arc that covers them.
    """

    parent: int
    child: int | None
    addresses: tuple[int, ...]
    arc: Arc


@dataclass(frozen=True)
class Alike:
    """How much some experts resemble each other.

    Attributes:
        ids: which ones.
        cosines: of all their tensors, taken as one vector; NaN where their shapes differ, or one is zero.
        norms: the Euclidean norm of those vectors; NaN where an entry is not finite.
    """

    ids: tuple[int, ...]
    cosines: NDArray[np.float64]
    norms: NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """All that a report shows."""

    name: str
    facts: Sequence[tuple[str, str]]
    headline: str
    rings: Sequence[Ring]
    hot: Hot | None
    signs: Signs | None
    shares: Mapping[str, Sequence[float]]
    shares_of: str
    alike: Alike | None
    lifecycle: Mapping[int, Lifecycle]
    deleted: frozenset[int]
    history: Sequence[Record]
    changes: Sequence[tuple[str, str]]


def gather(
    checkpoint: Checkpoint,
    before: Checkpoint | None,
    signs: Signs | None,
    visits: Weights | None,
    visits_after: Weights | None,
    changes: Sequence[tuple[str, str]],
) -> Subject:
    """Gather what a report shows of a checkpoint, and of the one before it."""
    hot = hot_arc(checkpoint, before)
    rings = []
    if before is not None and before.router_map is not None:
        rings.append(Ring("before", router_owners(before.router_map), before.num_experts, visits))
    if checkpoint.router_map is not None:
        title, counted = ("after", visits_after if visits_after is not None else visits) if rings else ("now", visits)
        rings.append(Ring(title, router_owners(checkpoint.router_map), checkpoint.num_experts, counted))
    shares, shares_of = _shares(rings, signs)
    return Subject(
        name=checkpoint.origin.path.name if checkpoint.origin.path else "a checkpoint",
        facts=_facts(checkpoint, before),
        headline=_headline(checkpoint, before, hot, signs),
        rings=rings,
        hot=hot,
        signs=signs,
        shares=shares,
        shares_of=shares_of,
        alike=_alike(checkpoint, hot, shares),
        lifecycle=checkpoint.lifecycle,
        deleted=checkpoint.head.deleted if checkpoint.head else frozenset(),
        history=checkpoint.history,
        changes=changes,
    )


def hot_arc(checkpoint: Checkpoint, before: Checkpoint | None) -> Hot | None:
    """Return what the last split gave away; of a checkpoint that is only planned to be split, what it will."""
    router = checkpoint.router_map
    if router is None:
        return None
    owners = router_owners(router)
    parent: int | None = None
    child: int | None = None
    addresses: list[int] = []
    if checkpoint.plan is not None:
        parent, addresses = checkpoint.plan.parent, list(checkpoint.plan.addresses)
    elif before is not None and before.router_map is not None and len(before.router_map) == len(owners):
        old = router_owners(before.router_map)
        born = np.flatnonzero(owners >= before.num_experts)
        if len(born):
            child = int(np.bincount(owners[born]).argmax())
            addresses = np.flatnonzero(owners == child).tolist()
            parent = int(np.bincount(old[addresses]).argmax())
    else:
        done = checkpoint.payload.get("mitosis")
        if isinstance(done, Mapping) and type(done.get("parent")) is int and type(done.get("child")) is int:
            parent, child = done["parent"], done["child"]
            addresses = np.flatnonzero(owners == child).tolist()
    if parent is None or not addresses or not all(0 <= address < len(owners) for address in addresses):
        return None
    return Hot(parent, child, tuple(addresses), ring.covering_arc(addresses, len(owners)))


def _shares(rings: Sequence[Ring], signs: Signs | None) -> tuple[dict[str, Sequence[float]], str]:
    """Return each expert's share of the visits, or of the addresses where nothing was counted."""
    if signs is not None:
        loads = {"before": signs.before, "predicted": signs.predicted, "measured": signs.measured}
        return {name: load.shares for name, load in loads.items() if load}, "visits"
    counts = {
        each.title: (np.bincount(each.owners, minlength=each.num_experts) / len(each.owners)).tolist() for each in rings
    }
    return counts, "addresses"


def _facts(checkpoint: Checkpoint, before: Checkpoint | None) -> list[tuple[str, str]]:
    facts = []
    for label, one in (("checkpoint", checkpoint), ("before", before)):
        if one is not None:
            step = one.payload.get("step")
            told = "" if step is None else f", step {step}"
            facts.append((label, f"{one.origin.path} ({one.origin.format}, {_experts(one)}{told})"))
    return facts


def _experts(checkpoint: Checkpoint) -> str:
    if checkpoint.head is None:
        return "no head"
    if checkpoint.head.kind is HeadKind.SINGLE:
        return "a single head"
    return f"{checkpoint.num_experts} experts"


def _headline(checkpoint: Checkpoint, before: Checkpoint | None, hot: Hot | None, signs: Signs | None) -> str:
    told = []
    if before is not None and before.num_experts != checkpoint.num_experts:
        told.append(f"{before.num_experts} → {checkpoint.num_experts} experts")
    elif before is None:
        told.append(_experts(checkpoint))
    if hot is not None and hot.child is not None:
        told.append(f"{addresses(len(hot.addresses))} went from expert {hot.parent} to expert {hot.child}")
    elif hot is not None:
        told.append(f"a split is planned: expert {hot.parent} gives up {addresses(len(hot.addresses))}")
    if signs is not None and signs.before is not None:
        share = f"largest share of visits {percent(signs.before.max_share)}"
        share += f" → {percent(signs.predicted.max_share)} predicted" if signs.predicted else ""
        share += f", {percent(signs.measured.max_share)} measured" if signs.measured else ""
        told.append(share)
    return "; ".join(told) or "nothing has moved"


# --- experts ---


def _alike(checkpoint: Checkpoint, hot: Hot | None, shares: Mapping[str, Sequence[float]]) -> Alike | None:
    """Compare experts: those of the split, then those with the largest shares."""
    if checkpoint.head is None or not checkpoint.head.experts:
        return None
    experts = checkpoint.head.experts
    latest: Sequence[float] = list(shares.values())[-1] if shares else ()
    by_share = sorted(experts, key=lambda i: (-latest[i] if i < len(latest) else 0.0, i))
    first = [i for i in (hot.parent, hot.child) if i in experts] if hot else []
    ids = tuple(sorted(list(dict.fromkeys([*first, *by_share]))[:MOST_COMPARED]))
    cosines = np.full((len(ids), len(ids)), np.nan)
    norms = np.full(len(ids), np.nan)
    kinds: dict[object, list[int]] = {}
    for place, i in enumerate(ids):
        kinds.setdefault(tuple((leaf, t.shape) for leaf, t in experts[i].items()), []).append(place)
    with progress.bar("comparing experts", len(ids), "experts") as count:
        for places in kinds.values():
            products = _products([experts[ids[place]] for place in places])
            found = np.sqrt(products.diagonal())
            norms[places] = found
            with np.errstate(divide="ignore", invalid="ignore"):
                cosines[np.ix_(places, places)] = products / np.outer(found, found)
            count(len(places))
    return Alike(ids, np.clip(cosines, -1, 1), norms)


def _products(experts: Sequence[Expert]) -> NDArray[np.float64]:
    """Return the scalar products of experts of one shape, each taken as one vector; a piece at a time, in float64."""
    total = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for leaf in experts[0]:
        flat = [expert[leaf].detach().reshape(-1) for expert in experts]
        for start in range(0, len(flat[0]), _PIECE):
            numbers = [as_numbers(one[start : start + _PIECE]) for one in flat]
            if any(piece is None or piece.is_complex() for piece in numbers):
                continue
            rows = torch.stack([piece for piece in numbers if piece is not None])
            total += rows @ rows.T
    found: NDArray[np.float64] = total.numpy()
    return np.where(np.isfinite(found), found, np.nan)
