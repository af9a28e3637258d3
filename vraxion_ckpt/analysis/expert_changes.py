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
    for (old, new), number in _owner_pairs(a, b).items():
        if number > found.get(new, (0, 0))[0]:
            found[new] = number, old
    return {new: old for new, (_, old) in found.items()}


def _owner_pairs(a: Checkpoint, b: Checkpoint) -> dict[tuple[int, int], int]:
    """Count the addresses of each pair of owners; empty if the rings cannot be compared."""
    both = _owners(a, b)
    return ring.count_pairs(*both) if both is not None else {}


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
    now = _ids_after(a, b, matching)
    moved = {pair: number for pair, number in _owner_pairs(a, b).items() if now.get(pair[0], -1) != pair[1]}
    if not moved:
        return None
    ids = max(a.num_experts, b.num_experts)
    codes = _moves(a, b, now, ids)
    arcs, arcs_in_all = _moved_arcs(codes, ids)
    return RingChange(
        length=len(codes),
        moved=sum(moved.values()),
        flows=tuple(Flow(before=old, after=new, addresses=number) for (old, new), number in moved.items()),
        arcs=arcs,
        arcs_in_all=arcs_in_all,
    )


def _moves(a: Checkpoint, b: Checkpoint, now: dict[int, int], ids: int) -> Ints:
    """Return ``old · ids + new`` for each address that moved, and −1 for each other, shape ``[L]``."""
    both = _owners(a, b)
    assert both is not None
    old, new = both
    stays = np.array([now.get(i, -1) for i in range(ids)])[old] == new
    codes = old * ids
    codes += new
    codes[stays] = -1
    return codes


def _moved_arcs(codes: Ints, ids: int) -> tuple[tuple[ArcChange, ...], int]:
    """Return the first arcs that moved from one expert to another, and the number of all."""
    starts = ring.arc_starts(codes)
    first = starts[: 2 * _MOST_ARCS + 2]  # between two arcs that moved, there is at most one that did not
    lengths = ring.run_lengths(first, len(codes))
    moved = [
        ArcChange(start=start, length=length, before=code // ids, after=code % ids)
        for start, length, code in zip(first.tolist(), lengths.tolist(), codes[first].tolist(), strict=True)
        if code >= 0
    ]
    return tuple(moved[:_MOST_ARCS]), int(np.count_nonzero((codes >= 0)[starts]))


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
