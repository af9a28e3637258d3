"""What a report shows, gathered from checkpoints: rings, loads, experts, and what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vraxion_ckpt.analysis.changes import Difference, Flow
from vraxion_ckpt.checkpoint import ring
from vraxion_ckpt.checkpoint.invariants import router_owners
from vraxion_ckpt.checkpoint.load_balance import ExpertLoads
from vraxion_ckpt.checkpoint.model import Checkpoint, Expert, HeadKind, Lifecycle, Record
from vraxion_ckpt.checkpoint.plain_data import as_numbers, in_pieces
from vraxion_ckpt.checkpoint.ring import Arc, Ints, Weights
from vraxion_ckpt.reporting.words import percent
from vraxion_ckpt.support import progress
from vraxion_ckpt.wording import count

# A matrix of more is no picture any more.
MOST_COMPARED = 64
_MOST_FLOWS = 3
_PIECE = 2**16


@dataclass(frozen=True)
class Ring:
    """One router map, and what was counted on it.

    Attributes:
        counted: whether the visits are those before a split, or those after training was resumed; empty where there
            is but one ring to count them on.
    """

    title: str
    owners: Ints
    num_experts: int
    visits: Weights | None
    counted: str


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
        cosines: of all their tensors, taken as one vector; NaN where their shapes differ, or a norm is NaN or zero.
        norms: the Euclidean norm of those vectors; NaN where torch cannot calculate with an entry, it is not
            finite, or too large to be squared.
    """

    ids: tuple[int, ...]
    cosines: NDArray[np.float64]
    norms: NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """All that a report shows."""

    name: str
    num_experts: int
    facts: Sequence[tuple[str, str]]
    headline: str
    rings: Sequence[Ring]
    hot: Hot | None
    signs: ExpertLoads | None
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
    signs: ExpertLoads | None,
    visits: Weights | None,
    visits_after: Weights | None,
    difference: Difference | None,
) -> Subject:
    """Gather what a report shows of a checkpoint, and of the one before it."""
    hot = hot_arc(checkpoint, before, difference)
    rings = []
    if before is not None:
        rings += _ring(before, "before", visits, "before")
    if rings:
        latest = (visits_after, "after") if visits_after is not None else (visits, "before")
        rings += _ring(checkpoint, "after", *latest)
    else:
        rings += _ring(checkpoint, "now", visits if visits is not None else visits_after, "")
    shares, shares_of = _shares(rings, signs)
    return Subject(
        name=checkpoint.origin.path.name if checkpoint.origin.path else "a checkpoint",
        num_experts=checkpoint.num_experts,
        facts=_facts(checkpoint, before),
        headline=_headline(checkpoint, before, hot, signs, difference),
        rings=rings,
        hot=hot,
        signs=signs,
        shares=shares,
        shares_of=shares_of,
        alike=_alike(checkpoint, hot, shares),
        lifecycle={i: row for i, row in checkpoint.lifecycle.items() if not row.assumed},
        deleted=checkpoint.head.deleted if checkpoint.head else frozenset(),
        history=checkpoint.history,
        changes=difference.summary() if difference else (),
    )


def _ring(checkpoint: Checkpoint, title: str, visits: Weights | None, counted: str) -> list[Ring]:
    """Return the ring of a checkpoint, if it has one whose addresses have owners."""
    if checkpoint.router_map is None or checkpoint.head is None:
        return []
    return [Ring(title, router_owners(checkpoint.router_map), checkpoint.num_experts, visits, counted)]


def hot_arc(checkpoint: Checkpoint, before: Checkpoint | None, difference: Difference | None) -> Hot | None:
    """Return what has changed hands: of several such parts of a ring, the largest that a new expert got, if one did.

    Where nothing has, it is what a plan will give away, or, of a checkpoint alone, what the last split gave away.
    """
    router = checkpoint.router_map
    if router is None or checkpoint.head is None:
        return None
    owners = router_owners(router)
    parent: int | None = None
    child: int | None = None
    addresses: list[int] = []
    if before is not None and before.head and before.router_map is not None and difference and difference.ring:
        flow = max(difference.ring.flows, key=lambda one: (one.after >= before.num_experts, one.addresses))
        parent, child = flow.before, flow.after
        old = router_owners(before.router_map)
        addresses = np.flatnonzero((old == parent) & (owners == child)).tolist()
    elif checkpoint.plan is not None:
        parent, addresses = checkpoint.plan.parent, list(checkpoint.plan.addresses)
    elif before is None:
        done = checkpoint.payload.get("mitosis")
        if isinstance(done, Mapping) and type(done.get("parent")) is int and type(done.get("child")) is int:
            parent, child = done["parent"], done["child"]
            addresses = np.flatnonzero(owners == child).tolist()
    if parent is None or not addresses or not all(0 <= address < len(owners) for address in addresses):
        return None
    return Hot(parent, child, tuple(addresses), ring.covering_arc(addresses, len(owners)))


def _shares(rings: Sequence[Ring], signs: ExpertLoads | None) -> tuple[dict[str, Sequence[float]], str]:
    """Return each expert's share of the visits, or of the addresses where nothing was counted."""
    if signs is not None:
        # Where nothing was or is to be split, the load is simply that of now.
        now = len(rings) == 1 and signs.predicted is None and signs.measured is None
        loads = {"now" if now else "before": signs.before, "predicted": signs.predicted, "measured": signs.measured}
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
    deleted = f", {len(checkpoint.head.deleted):,} of them deleted" if checkpoint.head.deleted else ""
    return count(checkpoint.num_experts, "expert") + deleted


def _headline(
    checkpoint: Checkpoint,
    before: Checkpoint | None,
    hot: Hot | None,
    signs: ExpertLoads | None,
    difference: Difference | None,
) -> str:
    told = []
    if before is None:
        told.append(_experts(checkpoint))
    elif before.head is None or checkpoint.head is None:
        if before.head is not checkpoint.head:
            told.append(f"{_experts(before)} → {_experts(checkpoint)}")
    elif before.num_experts != checkpoint.num_experts:
        told.append(f"{before.num_experts:,} → {count(checkpoint.num_experts, 'expert')}")
    if difference is not None and difference.ring is not None:
        told.append(_moved(difference.ring.flows))
    elif hot is not None and hot.child is not None:
        told.append(f"{count(len(hot.addresses), 'address')} went from expert {hot.parent} to expert {hot.child}")
    if hot is not None and hot.child is None:
        told.append(f"a split is planned: expert {hot.parent} gives up {count(len(hot.addresses), 'address')}")
    if before is not None and difference is not None and difference.ring is None:
        told.append(_unmoved(before, checkpoint))
    if signs is not None and signs.before is not None:
        share = f"largest share of visits {percent(signs.before.max_share)}"
        share += f" → {percent(signs.predicted.max_share)} predicted" if signs.predicted else ""
        share += f", {percent(signs.measured.max_share)} measured" if signs.measured else ""
        told.append(share)
    return "; ".join(told)


def _moved(flows: Sequence[Flow]) -> str:
    """Tell which addresses have gone from where to where; of many such flows, only how many addresses."""
    if len(flows) > _MOST_FLOWS:
        return f"{count(sum(flow.addresses for flow in flows), 'address')} have another owner"
    first, *others = flows
    told = [f"{count(first.addresses, 'address')} went from expert {first.before} to expert {first.after}"]
    return ", ".join(told + [f"{one.addresses:,} from expert {one.before} to expert {one.after}" for one in others])


def _unmoved(before: Checkpoint, checkpoint: Checkpoint) -> str:
    lengths = [len(one.router_map) if one.router_map is not None and one.head else 0 for one in (before, checkpoint)]
    if lengths[0] == lengths[1]:
        return "no address has another owner" if lengths[0] else "there is no ring"
    return " → ".join(count(length, "address") if length else "no ring" for length in lengths)


# --- experts ---


def _alike(checkpoint: Checkpoint, hot: Hot | None, shares: Mapping[str, Sequence[float]]) -> Alike | None:
    """Compare experts: those of the split, then those with the largest shares."""
    if checkpoint.head is None or not checkpoint.head.experts:
        return None
    present = checkpoint.head.experts
    latest: Sequence[float] = list(shares.values())[-1] if shares else ()
    by_share = sorted(present, key=lambda i: (-latest[i] if i < len(latest) else 0.0, i))
    first = [i for i in (hot.parent, hot.child) if i in present] if hot else []
    ids = tuple(sorted(list(dict.fromkeys([*first, *by_share]))[:MOST_COMPARED]))
    cosines = np.full((len(ids), len(ids)), np.nan)
    norms = np.full(len(ids), np.nan)
    kinds: dict[object, list[int]] = {}
    for place, i in enumerate(ids):
        kind = sorted((leaf, tuple(tensor.shape), tensor.is_complex()) for leaf, tensor in present[i].items())
        kinds.setdefault(tuple(kind), []).append(place)
    with progress.progress_bar("comparing experts", len(ids), "experts") as count:
        for places in kinds.values():
            products = _products([present[ids[place]] for place in places])
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
        for pieces in in_pieces(*(expert[leaf] for expert in experts), size=_PIECE):
            rows = torch.stack([_as_reals(piece) for piece in pieces])
            total += rows @ rows.T
    found: NDArray[np.float64] = total.numpy()
    return np.where(np.isfinite(found), found, np.nan)


def _as_reals(tensor: Tensor) -> Tensor:
    """Return a flat tensor as float64, a complex number as two of them; NaN where torch cannot calculate with it."""
    numbers = as_numbers(tensor)
    if numbers is None:
        return torch.full((len(tensor),), torch.nan, dtype=torch.float64)
    return torch.view_as_real(numbers).reshape(-1) if numbers.is_complex() else numbers
