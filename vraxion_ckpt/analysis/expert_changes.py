"""Compare the experts of two checkpoints, the ring of addresses and the lifecycle rows."""

from __future__ import annotations

import numpy as np

from vraxion_ckpt.analysis.changes import ArcChange, Change, ExpertChange, Flow, RingChange
from vraxion_ckpt.analysis.match_experts import Matching
from vraxion_ckpt.analysis.measurement import Measure, measure
from vraxion_ckpt.analysis.value_changes import added, removed, value_changes
from vraxion_ckpt.checkpoint import ring
from vraxion_ckpt.checkpoint.head import Expert
from vraxion_ckpt.checkpoint.invariants import router_owners
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.ring import Ints

_MOST_ARCS = 4096
_PIECE = 2**18  # addresses


def expert_changes(a: Checkpoint, b: Checkpoint, matching: Matching) -> tuple[ExpertChange, ...]:
    """Return every expert that differs, or has another name."""
    if a.head is None or b.head is None:
        return ()
    first, second = a.head.experts, b.head.experts
    changes = [
        ExpertChange(what="renamed", before=i, after=j)
        for i, j in matching.same.items()
        if a.head.prefix(i) != b.head.prefix(j)
    ]
    sources = _former_owners(a, b) if matching.added else {}
    changes += [
        ExpertChange(what="changed", before=i, after=i, measure=_between(first[i], second[i])) for i in matching.changed
    ]
    for j, twin in matching.added.items():
        source = sources.get(j)
        parent = first.get(source) if source is not None and twin is None else None
        changes.append(
            ExpertChange(
                what="added",
                before=None,
                after=j,
                equal_to=twin,
                took_from=source,
                measure=_between(parent, second[j]) if parent else None,
            )
        )
    changes += [
        ExpertChange(what="removed", before=i, after=None, equal_to=twin) for i, twin in matching.removed.items()
    ]
    return tuple(changes)


def _between(a: Expert, b: Expert) -> Measure | None:
    one, other = a.references(), b.references()
    return measure([(one[leaf], other[leaf]) for leaf in one]) if one.keys() == other.keys() else None


def _former_owners(a: Checkpoint, b: Checkpoint) -> dict[int, int]:
    """Return for each expert of the second checkpoint the previous owner of most of its addresses."""
    found: dict[int, tuple[int, int]] = {}
    both = _owners(a, b)
    for (old, new), number in (ring.count_pairs(*both) if both is not None else {}).items():
        if number > found.get(new, (0, 0))[0]:
            found[new] = number, old
    return {new: old for new, (_, old) in found.items()}


def _owners(a: Checkpoint, b: Checkpoint) -> tuple[Ints, Ints] | None:
    """Return both router maps, or None if they cannot be compared."""
    old, new = a.router_reference, b.router_reference
    if a.head is None or b.head is None or old is None or new is None or old.shape != new.shape:
        return None  # the valid owners are unknown without a head
    return router_owners(old), router_owners(new)


def _ids_after(a: Checkpoint, b: Checkpoint, matching: Matching) -> dict[int, int]:
    """Return the id in the second checkpoint of each expert of the first. Experts without tensors keep their id."""
    deleted = b.head.deleted if b.head else frozenset()
    kept = {i: i for i in range(a.num_experts) if i not in matching.removed or i in deleted}
    return kept | matching.pairs


def ring_change(a: Checkpoint, b: Checkpoint, matching: Matching) -> RingChange | None:
    """Return the addresses with another owner, or None if there are none or the rings cannot be compared."""
    now, both = _ids_after(a, b, matching), _owners(a, b)
    if both is None:
        return None
    moved = {pair: number for pair, number in ring.count_pairs(*both).items() if now.get(pair[0], -1) != pair[1]}
    if not moved:
        return None
    ids = range(max(a.num_experts, b.num_experts))
    arcs, arcs_in_all = _moved_arcs(*both, np.array([now.get(i, -1) for i in ids]))
    return RingChange(
        length=len(both[0]),
        moved=sum(moved.values()),
        flows=tuple(Flow(before=old, after=new, addresses=number) for (old, new), number in moved.items()),
        arcs=arcs,
        arcs_in_all=arcs_in_all,
    )


def _moved_arcs(old: Ints, new: Ints, now: Ints) -> tuple[tuple[ArcChange, ...], int]:
    """Return the first arcs that moved from one expert to another, and the number of all.

    Args:
        old: the owner of each address before, shape ``[L]``.
        new: the owner of each address after, shape ``[L]``.
        now: the new id of each old owner.
    """
    ids = len(now)
    enough = 2 * _MOST_ARCS + 1  # between two arcs that moved, there is at most one that did not
    kept: list[tuple[int, int]] = []  # starts and codes of arcs
    in_all = 0
    last = _moves(old[-1:], new[-1:], now)[0]
    for at in range(0, len(old), _PIECE):
        codes = _moves(old[at : at + _PIECE], new[at : at + _PIECE], now)
        starts = np.flatnonzero(np.diff(codes, prepend=last))
        last = codes[-1]
        in_all += int(np.count_nonzero(codes[starts] >= 0))
        if len(kept) < enough:
            kept += zip((at + starts[:enough]).tolist(), codes[starts[:enough]].tolist(), strict=True)
    if not kept:  # the whole ring is one arc
        kept, in_all = [(0, int(last))], int(last >= 0)
    lengths = ring.run_lengths(np.array([start for start, _ in kept]), len(old)).tolist()
    arcs = [
        ArcChange(start=start, length=length, before=code // ids, after=code % ids)
        for (start, code), length in zip(kept, lengths, strict=True)
        if code >= 0
    ]
    return tuple(arcs[:_MOST_ARCS]), in_all


def _moves(old: Ints, new: Ints, now: Ints) -> Ints:
    """Return ``old · ids + new`` for each address that moved, and −1 for each other."""
    codes = old * len(now)
    codes += new
    np.putmask(codes, now.take(old) == new, -1)
    return codes


def lifecycle_changes(a: Checkpoint, b: Checkpoint, matching: Matching) -> list[Change]:
    """Compare the lifecycle rows of matching experts."""
    changes: list[Change] = []
    now = _ids_after(a, b, matching)
    for i, row in a.lifecycle.items():
        other = b.lifecycle.get(now.get(i, -1))
        if other is not None and not row.assumed and not other.assumed:
            changes += value_changes(vars(row), vars(other), f"row of expert {i}")
        elif row != other:  # an assumed row is in no file
            if not row.assumed:
                changes.append(removed(f"row of expert {i}", None))
            if other is not None and not other.assumed:
                changes.append(added(f"row of expert {now[i]}", None))
    met = set(now.values())
    new = (j for j, row in b.lifecycle.items() if j not in met and not row.assumed)
    return changes + [added(f"row of expert {j}", None) for j in new]
