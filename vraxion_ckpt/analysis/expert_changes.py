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
    changes += [
        ExpertChange(what="changed", before=i, after=i, measure=_between(first[i], second[i])) for i in matching.changed
    ]
    for j, twin in matching.added.items():
        source = _took_from(a, b, j)
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
    return measure([(a[leaf], b[leaf]) for leaf in a]) if a.keys() == b.keys() else None


def _took_from(a: Checkpoint, b: Checkpoint, expert: int) -> int | None:
    """Return the previous owner of most of an expert's addresses."""
    if a.router_map is None or b.router_map is None or len(a.router_map) != len(b.router_map):
        return None
    former = router_owners(a.router_map)[router_owners(b.router_map) == expert]
    return int(np.bincount(former).argmax()) if len(former) else None


def _ids_after(a: Checkpoint, b: Checkpoint, matching: Matching) -> dict[int, int]:
    """Return the id in the second checkpoint of each expert of the first. Experts without tensors keep their id."""
    deleted = b.head.deleted if b.head else frozenset()
    kept = {i: i for i in range(a.num_experts) if i not in matching.removed or i in deleted}
    return kept | matching.pairs


def ring_change(a: Checkpoint, b: Checkpoint, matching: Matching) -> RingChange | None:
    """Return the addresses with another owner, or None if there are none or the rings cannot be compared."""
    if a.head is None or b.head is None or a.router_map is None or b.router_map is None:
        return None  # the valid owners are unknown without a head
    if len(a.router_map) != len(b.router_map):
        return None
    old, new = router_owners(a.router_map), router_owners(b.router_map)
    now = _ids_after(a, b, matching)
    ids = max(a.num_experts, b.num_experts)
    moved = np.array([now.get(i, -1) for i in range(ids)])[old] != new
    if not moved.any():
        return None
    codes = np.where(moved, old * ids + new, -1)
    arcs = [(start, length, code) for start, length, code in ring.arcs(codes) if code >= 0]
    kinds, counts = np.unique(codes[moved], return_counts=True)
    return RingChange(
        length=len(old),
        moved=int(moved.sum()),
        flows=tuple(
            Flow(before=code // ids, after=code % ids, addresses=n)
            for code, n in zip(kinds.tolist(), counts.tolist(), strict=True)
        ),
        arcs=tuple(
            ArcChange(start=start, length=length, before=code // ids, after=code % ids)
            for start, length, code in arcs[:_MOST_ARCS]
        ),
        arcs_in_all=len(arcs),
    )


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
    new = (j for j, row in b.lifecycle.items() if j not in now.values() and not row.assumed)
    return changes + [added(f"row of expert {j}", None) for j in new]
