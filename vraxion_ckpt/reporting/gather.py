"""Collect the content of a report: rings, expert load, experts, and changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vraxion_ckpt.analysis.changes import Difference, Flow
from vraxion_ckpt.checkpoint import ring
from vraxion_ckpt.checkpoint.head import HeadKind
from vraxion_ckpt.checkpoint.invariants import router_owners
from vraxion_ckpt.checkpoint.load_balance import ExpertLoads
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle
from vraxion_ckpt.checkpoint.provenance import Record
from vraxion_ckpt.checkpoint.ring import Arc, Ints, Weights
from vraxion_ckpt.reporting.similarity import Similarity, compare_experts
from vraxion_ckpt.reporting.words import percent
from vraxion_ckpt.wording import count

# A larger matrix of cosines would be illegible.
_MOST_COMPARED = 64
_MOST_FLOWS = 3


@dataclass(frozen=True)
class Ring:
    """A router map and the visits of its addresses.

    Attributes:
        owners: the expert of each address, shape ``[L]``.
        visits: how often each address was visited, shape ``[L]``.
        counted: when the visits were counted, ``before`` or ``after`` the split; empty if there is only one ring.
    """

    title: str
    owners: Ints
    num_experts: int
    visits: Weights | None
    counted: str


@dataclass(frozen=True)
class Hot:
    """The addresses that a split moves from a parent to its child.

    Attributes:
        child: the expert that received the addresses; None if the split is only planned.
        addresses: the addresses, shape ``[n]`` with n ≥ 1.
        arc: the shortest arc that covers the addresses.
    """

    parent: int
    child: int | None
    addresses: Ints
    arc: Arc


@dataclass(frozen=True)
class Subject:
    """The content of a report.

    Attributes:
        shares: the share of each expert, by state: before, predicted, measured, after or now.
        shares_of: what the shares are shares of, ``visits`` or ``addresses``.
        signs: the experts' loads before the split, predicted and measured; None if no visits were given.
        lifecycle: the lifecycle row of each expert, if the checkpoint records it.
        changes: labels and descriptions of the differences between the earlier checkpoint and this one.
    """

    name: str
    num_experts: int
    facts: Sequence[tuple[str, str]]
    headline: str
    rings: Sequence[Ring]
    hot: Hot | None
    signs: ExpertLoads | None
    shares: Mapping[str, Sequence[float]]
    shares_of: str
    similarity: Similarity | None
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
    """Collect the content of a report.

    Args:
        checkpoint: the checkpoint to show.
        before: the checkpoint before the split, if given.
        signs: the experts' loads, if visits were given.
        visits: visits counted before the split, shape ``[L]``.
        visits_after: visits counted after training was resumed, shape ``[L]``.
        difference: the difference between `before` and `checkpoint`.
    """
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
        similarity=_similarity(checkpoint, hot, shares),
        lifecycle={i: row for i, row in checkpoint.lifecycle.items() if not row.assumed},
        deleted=checkpoint.head.deleted if checkpoint.head else frozenset(),
        history=checkpoint.history,
        changes=difference.summary() if difference else (),
    )


def _ring(checkpoint: Checkpoint, title: str, visits: Weights | None, counted: str) -> list[Ring]:
    """Return the ring of a checkpoint, or an empty list if it has no router map or no head."""
    router = checkpoint.router_reference
    if router is None or checkpoint.head is None:
        return []
    return [Ring(title, router_owners(router), checkpoint.num_experts, visits, counted)]


def hot_arc(checkpoint: Checkpoint, before: Checkpoint | None, difference: Difference | None) -> Hot | None:
    """Return the addresses that moved from one expert to another, or None.

    If addresses moved between several pairs of experts, this is the largest move to a new expert, or else the largest
    move. If none moved, these are the addresses of the plan. If there is neither `before` nor a plan, they are the
    addresses of the child of the last split.
    """
    router = checkpoint.router_reference
    if router is None or checkpoint.head is None:
        return None
    owners = router_owners(router)
    parent: int | None = None
    child: int | None = None
    addresses: Ints | None = None
    former = before.router_reference if before is not None and before.head is not None else None
    if before is not None and former is not None and difference and difference.ring:
        flow = max(difference.ring.flows, key=lambda one: (one.after >= before.num_experts, one.addresses))
        parent, child = flow.before, flow.after
        old = router_owners(former)
        addresses = np.flatnonzero((old == parent) & (owners == child))
    elif checkpoint.plan is not None:
        parent, addresses = checkpoint.plan.parent, ring.as_addresses(checkpoint.plan.addresses, len(owners))
    elif before is None:
        done = checkpoint.payload.get("mitosis")
        if isinstance(done, Mapping) and type(done.get("parent")) is int and type(done.get("child")) is int:
            parent, child = done["parent"], done["child"]
            addresses = np.flatnonzero(owners == child)
    if parent is None or addresses is None or not len(addresses):
        return None
    return Hot(parent, child, addresses, ring.covering_arc(addresses, len(owners)))


def _shares(rings: Sequence[Ring], signs: ExpertLoads | None) -> tuple[dict[str, Sequence[float]], str]:
    """Return each expert's share of the visits, or of the addresses if no visits were given."""
    if signs is not None:
        # Without a split, there is only one state.
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
            at_step = "" if step is None else f", step {step}"
            facts.append((label, f"{one.origin.path} ({one.origin.format}, {_experts(one)}{at_step})"))
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
    parts = []
    if before is None:
        parts.append(_experts(checkpoint))
    elif before.head is None or checkpoint.head is None:
        if before.head is not checkpoint.head:
            parts.append(f"{_experts(before)} → {_experts(checkpoint)}")
    elif before.num_experts != checkpoint.num_experts:
        parts.append(f"{before.num_experts:,} → {count(checkpoint.num_experts, 'expert')}")
    if difference is not None and difference.ring is not None:
        parts.append(_moved(difference.ring.flows))
    elif hot is not None and hot.child is not None:
        parts.append(f"{count(len(hot.addresses), 'address')} went from expert {hot.parent} to expert {hot.child}")
    if hot is not None and hot.child is None:
        parts.append(f"a split is planned: expert {hot.parent} gives up {count(len(hot.addresses), 'address')}")
    if before is not None and difference is not None and difference.ring is None:
        parts.append(_unmoved(before, checkpoint))
    if signs is not None and signs.before is not None:
        share = f"largest share of visits {percent(signs.before.max_share)}"
        share += f" → {percent(signs.predicted.max_share)} predicted" if signs.predicted else ""
        share += f", {percent(signs.measured.max_share)} measured" if signs.measured else ""
        parts.append(share)
    return "; ".join(parts)


def _moved(flows: Sequence[Flow]) -> str:
    """Describe the moves of addresses between experts. If there are many, give only the total."""
    if len(flows) > _MOST_FLOWS:
        return f"{count(sum(flow.addresses for flow in flows), 'address')} moved"
    first, *others = flows
    parts = [f"{count(first.addresses, 'address')} went from expert {first.before} to expert {first.after}"]
    return ", ".join(parts + [f"{one.addresses:,} from expert {one.before} to expert {one.after}" for one in others])


def _unmoved(before: Checkpoint, checkpoint: Checkpoint) -> str:
    rings = [one.router_reference if one.head else None for one in (before, checkpoint)]
    lengths = [ring.numel() if ring is not None else 0 for ring in rings]
    if lengths[0] == lengths[1]:
        return "no address moved" if lengths[0] else "there is no ring"
    return " → ".join(count(length, "address") if length else "no ring" for length in lengths)


# --- experts ---


def _similarity(checkpoint: Checkpoint, hot: Hot | None, shares: Mapping[str, Sequence[float]]) -> Similarity | None:
    """Compare the experts of the split, and those with the largest shares up to a limit."""
    if checkpoint.head is None or not checkpoint.head.experts:
        return None
    present = checkpoint.head.experts
    latest: Sequence[float] = list(shares.values())[-1] if shares else ()
    by_share = sorted(present, key=lambda i: (-latest[i] if i < len(latest) else 0.0, i))
    first = [i for i in (hot.parent, hot.child) if i in present] if hot else []
    return compare_experts(present, list(dict.fromkeys([*first, *by_share]))[:_MOST_COMPARED])
