"""Compare two checkpoints of any formats.

Experts are matched first, so that an expert that was only renumbered, or moved from a single head to a list of
experts, is reported as renamed. A new expert that is bit-identical to another is reported as a clone.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import Tensor, nn

from vraxion_ckpt.analysis.changes import (
    ArcChange,
    Change,
    Difference,
    ExpertChange,
    Flow,
    RingChange,
    Side,
)
from vraxion_ckpt.analysis.match_experts import Matching, match_experts
from vraxion_ckpt.analysis.measurement import Measure, measure
from vraxion_ckpt.checkpoint import ring
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences, differences, same_bits
from vraxion_ckpt.checkpoint.invariants import router_owners, shared_names
from vraxion_ckpt.checkpoint.model import Checkpoint, Expert, Head, ParamGroup, unbound_state_dict
from vraxion_ckpt.checkpoint.plain_data import dtype_and_shape, size_of
from vraxion_ckpt.checkpoint.torch_optimizer import unbind
from vraxion_ckpt.errors import memory_errors
from vraxion_ckpt.plugins.discovery import AdapterLike
from vraxion_ckpt.reading.opening import PathLike, bound_if_possible, read_unbound
from vraxion_ckpt.reading.read_options import ReadKeywords, ReadOptions
from vraxion_ckpt.support import progress
from vraxion_ckpt.wording import count

_MOST_ARCS = 4096


@memory_errors()
def diff(
    a: PathLike,
    b: PathLike,
    *,
    from_b: AdapterLike | None = None,
    **reading: Unpack[ReadKeywords],
) -> Difference:
    """Compare two checkpoints of any formats, every tensor bit by bit.

    Args:
        a: a file or a directory.
        b: a file or a directory.
        from_b: the format of `b`; detected from the content if None.
        reading: see `ReadOptions`; ``from_`` is the format of `a`.

    Returns:
        The difference from `a` to `b`.

    Raises:
        UsageError: a path does not exist, or an option is wrong.
        SourceError: a checkpoint is damaged, unsafe, inconsistent or not supported.
        ChangedError: a file changed while it was being read.
    """
    options = ReadOptions(**reading)
    one, other = read_unbound(a, options), read_unbound(b, replace(options, from_=from_b))
    found = diff_checkpoints(one, other, options)
    for checkpoint in (one, other):
        checkpoint.sources.verify()
        checkpoint.sources.check_unchanged()
    return found


def diff_checkpoints(
    a: Checkpoint,
    b: Checkpoint,
    options: ReadOptions,
) -> Difference:
    """Compare two opened checkpoints."""
    a.open_experts()
    b.open_experts()
    (a, refused_a), (b, refused_b) = (bound_if_possible(c, options) for c in (a, b))
    not_bound = [f"{c.origin.path}: {why.message}" for c, why in ((a, refused_a), (b, refused_b)) if why]
    matching = match_experts(a.head, b.head)
    names = _names(a.head, b.head, matching)
    size = _size(b)
    with progress.progress_bar("comparing", size) as count:
        model, tensors_identical = _model_changes(a, b, names, count)
        optimizer, slots_identical = _optimizer_changes(a, b, names, count)
    sections: dict[str, list[Change]] = {
        "model": model,
        "optimizer": optimizer,
        "payload": list(_changes(a.payload, b.payload)),
        "lifecycle": _lifecycle_changes(a, b, matching),
        "history": _history_changes(a, b),
        "other": [*_changes(_others(a), _others(b)), *_tie_changes(a, b, names), *_order_changes(a, b, names)],
    }
    if not any(sections.values()):  # all values are equal; compare the format variants
        sections["other"] = _dialect_changes(a, b)
    if not any(sections.values()):
        lines = checkpoint_differences(a, b, same=lambda x, y: _describe(x) == _describe(y))
        sections["other"] = [Change(what="changed", before=line, after=line, old=None, new=None) for line in lines]
    return Difference(
        before=_side(a),
        after=_side(b),
        identical=not any(sections.values()),
        tensors_identical=tensors_identical,
        slots_identical=slots_identical,
        bytes_compared=size,
        experts=_expert_changes(a, b, matching),
        ring=_ring_change(a, b, matching),
        not_bound="; ".join(not_bound) or None,
        **{section: tuple(changes) for section, changes in sections.items()},
    )


def _side(checkpoint: Checkpoint) -> Side:
    return Side(
        path=checkpoint.origin.path or Path(),
        format=checkpoint.origin.format,
        num_experts=checkpoint.num_experts,
        step=checkpoint.payload.get("step"),
    )


def _size(checkpoint: Checkpoint) -> int:
    slots = checkpoint.optimizer.state if checkpoint.optimizer else {}
    return size_of([checkpoint.state_dict(), slots])


# --- tensors ---

# Maps the name of a tensor of the first checkpoint to its name in the second, or to None if it is not there.
_Names = Callable[[str], str | None]
_Count = Callable[[int], object]


def _names(a: Head | None, b: Head | None, matching: Matching) -> _Names:
    known: dict[str, str | None] = {}
    pairs = matching.pairs
    for i, expert in a.experts.items() if a else ():
        for leaf in expert:
            assert a is not None
            known[a.prefix(i) + leaf] = b.prefix(pairs[i]) + leaf if b and i in pairs else None
    return lambda name: known.get(name, name)


def _model_changes(a: Checkpoint, b: Checkpoint, names: _Names, count: _Count) -> tuple[list[Change], int]:
    old, new = a.state_dict(), b.state_dict()
    changes, identical, met = [], 0, set()
    for name, tensor in old.items():
        other = names(name)
        if other is None or other not in new:
            changes.append(_removed(name, tensor))
            continue
        met.add(other)
        found = _tensor_change(name, other, tensor, new[other])
        changes += [found] if found else []
        identical += found is None
        count(new[other].numel() * new[other].itemsize)
    changes += [_added(name, tensor) for name, tensor in new.items() if name not in met]
    return changes, identical


def _tensor_change(before: str, after: str, a: Tensor, b: Tensor) -> Change | None:
    old, new = _describe(a), _describe(b)
    if same_bits(a, b):
        return None if before == after else Change(what="renamed", before=before, after=after, old=old, new=new)
    return Change(what="changed", before=before, after=after, old=old, new=new, measure=measure([(a, b)]))


def _describe(value: Any) -> Any:
    """Return a tensor as dtype and shape, and a large value as its size."""
    if isinstance(value, Tensor):
        kind = "parameter " if isinstance(value, nn.Parameter) else ""
        grad = "" if value.requires_grad == bool(kind) else " requires_grad" if value.requires_grad else " frozen"
        return f"{kind}{dtype_and_shape(value)}{grad}"
    if isinstance(value, Mapping) and len(value) > 4:
        return f"{len(value)} entries"
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"list of {len(value)}"
    return value


def _added(name: str, value: Any) -> Change:
    return Change(what="added", before=None, after=name, old=None, new=_describe(value))


def _removed(name: str, value: Any) -> Change:
    return Change(what="removed", before=name, after=None, old=_describe(value), new=None)


# --- experts, ring ---


def _expert_changes(a: Checkpoint, b: Checkpoint, matching: Matching) -> tuple[ExpertChange, ...]:
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


def _ring_change(a: Checkpoint, b: Checkpoint, matching: Matching) -> RingChange | None:
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


# --- optimizer ---


def _optimizer_changes(a: Checkpoint, b: Checkpoint, names: _Names, count: _Count) -> tuple[list[Change], int]:
    if a.optimizer is None or b.optimizer is None:
        old, new = (unbind(c.optimizer) if c.optimizer else unbound_state_dict(c) for c in (a, b))
        if old is None or new is None:
            gone = [_removed("optimizer", _in_short(old))] if old is not None else []
            return gone + ([_added("optimizer", _in_short(new))] if new is not None else []), 0
        found = list(_changes(old, new, "optimizer"))
        return found, 0 if found else sum(map(len, new.get("state", {}).values()))
    changes: list[Change] = []
    identical, met = 0, set()
    for name, slots in a.optimizer.state.items():
        other = names(name)
        others = b.optimizer.state.get(other, {}) if other is not None else {}
        met.add(other)
        for slot in [*slots, *(slot for slot in others if slot not in slots)]:
            found = list(_entry_changes(slots, others, slot, f"{name}.{slot}", f"{other}.{slot}"))
            changes += found
            identical += not found
        count(size_of(others))
    for name, slots in b.optimizer.state.items():
        if name not in met:
            changes += [_added(f"{name}.{slot}", value) for slot, value in slots.items()]
    changes += _group_changes(a.optimizer.groups, b.optimizer.groups, names)
    changes += _changes(a.optimizer.extra, b.optimizer.extra, "optimizer")
    changes += _order(a.optimizer.params, b.optimizer.params, names, "parameters of the optimizer")
    return changes, identical


def _in_short(state_dict: Mapping[str, Any]) -> str:
    number = sum(len(group.get("params", ())) for group in state_dict.get("param_groups", ()))
    return f"{count(number, 'parameter')}, {len(state_dict.get('state', ()))} with state"


def _group_changes(old: Sequence[ParamGroup], new: Sequence[ParamGroup], names: _Names) -> Iterator[Change]:
    for i, (a, b) in enumerate(zip(old, new, strict=False)):
        yield from _changes(a.options, b.options, f"group {i}")
        former = [names(name) for name in a.params]
        known, now = set(former), set(b.params)
        yield from (
            _removed(f"group {i}: {n}", "trained") for n, f in zip(a.params, former, strict=True) if f not in now
        )
        yield from (_added(f"group {i}: {name}", "trained") for name in b.params if name not in known)
    yield from (_removed(f"group {i}", count(len(old[i].params), "parameter")) for i in range(len(new), len(old)))
    yield from (_added(f"group {i}", count(len(new[i].params), "parameter")) for i in range(len(old), len(new)))


def _order(a: Iterable[str], b: Iterable[str], names: _Names, what: str) -> list[Change]:
    """Return a change if the names in both lists have another order."""
    former = [names(name) for name in a]
    both = set(former) & set(b)
    old, new = [name for name in former if name in both], [name for name in b if name in both]
    if old == new:
        return []
    at = next(i for i, (x, y) in enumerate(zip(old, new, strict=True)) if x != y)
    place = f"order of the {what}"
    return [Change(what="changed", before=place, after=place, old=f"{old[at]} at {at}", new=f"{new[at]} at {at}")]


# --- everything else ---


def _others(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the parts of a checkpoint that belong to no other section."""
    head = checkpoint.head
    return {
        "module versions": checkpoint.metadata,
        "planned split": asdict(checkpoint.plan) if checkpoint.plan else None,
        "garbage-collected experts": sorted(head.deleted) if head else [],
    }


def _order_changes(a: Checkpoint, b: Checkpoint, names: _Names) -> list[Change]:
    changes = _order(a.tensor_names(), b.tensor_names(), names, "model's tensors")
    if a.param_names is not None and b.param_names is not None:
        changes += _order(a.param_names, b.param_names, names, "param_names")
    return changes


def _tie_changes(a: Checkpoint, b: Checkpoint, names: _Names) -> list[Change]:
    """Return the tensors that share memory in only one of the checkpoints."""

    def renamed(name: str) -> str:
        parameter, _, slot = name.rpartition(".")
        known = names(name)
        if known != name:
            return str(known)
        other = names(parameter) if parameter else None
        return name if other in (None, parameter) else f"{other}.{slot}"

    old = {frozenset(map(renamed, tie)) for tie in shared_names(a)}
    new = {frozenset(tie) for tie in shared_names(b)}
    changes = [_removed("memory under several names", ", ".join(sorted(tie))) for tie in old - new]
    return changes + [_added("memory under several names", ", ".join(sorted(tie))) for tie in new - old]


def _dialect_changes(a: Checkpoint, b: Checkpoint) -> list[Change]:
    """Compare the format variants of two checkpoints of the same format, because a trainer may depend on them."""
    format_ = a.origin.format
    if format_ != b.origin.format:
        return []
    own = {**a.origin.local, **a.origin.dialects}, {**b.origin.local, **b.origin.dialects}
    return list(_changes({"spelling": own[0]}, {"spelling": own[1]}))


def _lifecycle_changes(a: Checkpoint, b: Checkpoint, matching: Matching) -> list[Change]:
    changes: list[Change] = []
    now = _ids_after(a, b, matching)
    for i, row in a.lifecycle.items():
        other = b.lifecycle.get(now.get(i, -1))
        if other is not None and not row.assumed and not other.assumed:
            changes += _changes(vars(row), vars(other), f"row of expert {i}")
        elif row != other:  # an assumed row is in no file
            if not row.assumed:
                changes.append(_removed(f"row of expert {i}", None))
            if other is not None and not other.assumed:
                changes.append(_added(f"row of expert {now[i]}", None))
    added = (j for j, row in b.lifecycle.items() if j not in now.values() and not row.assumed)
    return changes + [_added(f"row of expert {j}", None) for j in added]


def _history_changes(a: Checkpoint, b: Checkpoint) -> list[Change]:
    """Compare two histories by their common prefix."""
    both = 0
    for one, other in zip(a.history, b.history, strict=False):
        if list(differences(one, other)):
            break
        both += 1
    return [
        *(_removed(f"step {n + 1}", f"{r.name}: {r.summary}") for n, r in enumerate(a.history) if n >= both),
        *(_added(f"step {n + 1}", f"{r.name}: {r.summary}") for n, r in enumerate(b.history) if n >= both),
    ]


def _changes(a: Any, b: Any, place: str = "") -> Iterator[Change]:
    """Yield each difference inside two plain values."""
    if isinstance(a, OrderedDict) and isinstance(b, OrderedDict) and (vars(a) or vars(b)):
        yield from _changes(vars(a), vars(b), f"{place} attributes")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{place}.{key}" if place else str(key)
            yield from _entry_changes(a, b, key, inner, inner)
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        found = _tensor_change(place, place, a, b)
        if found:
            yield found
    elif isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b) and not _is_flat([*a, *b]):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _changes(x, y, f"{place}[{i}]")
    elif not _same(a, b):
        old, new = _describe(a), _describe(b)
        if type(a) is not type(b) and isinstance(old, str) and old == new:
            old, new = (f"{type(value).__name__}, {told}" for value, told in ((a, old), (b, new)))
        elif isinstance(a, list | tuple) and isinstance(old, str) and old == new:
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not _same(x, y))
            place, old, new = f"{place}[{at}] and perhaps more", a[at], b[at]
        yield Change(what="changed", before=place, after=place, old=old, new=new)


def _entry_changes(a: Mapping[Any, Any], b: Mapping[Any, Any], key: Any, before: str, after: str) -> Iterator[Change]:
    if key not in b:
        yield _removed(before, a[key])
    elif key not in a:
        yield _added(after, b[key])
    else:
        for change in _changes(a[key], b[key], after):
            name = None if change.before is None else before + change.before.removeprefix(after)
            yield change.model_copy(update={"before": name})


def _is_flat(values: list[Any]) -> bool:
    return not any(isinstance(value, Tensor | Mapping | list | tuple) for value in values)


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    return not any(differences(a, b))
