"""Compare two checkpoints of any formats.

Experts are matched first, so that an expert that was only renumbered, or moved from a single head to a list of
experts, is reported as renamed. A new expert that is bit-identical to another is reported as a clone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from vraxion_ckpt.analysis.changes import Change, Difference, Side
from vraxion_ckpt.analysis.expert_changes import expert_changes, lifecycle_changes, ring_change
from vraxion_ckpt.analysis.layout_differences import as_stated_by, neighbour_changes
from vraxion_ckpt.analysis.match_experts import Matching, match_experts
from vraxion_ckpt.analysis.optimizer_changes import optimizer_changes
from vraxion_ckpt.analysis.value_changes import (
    NameMap,
    added,
    describe_value,
    order_changes,
    removed,
    tensor_change,
    value_changes,
)
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences, differences
from vraxion_ckpt.checkpoint.entries import refuse_missing
from vraxion_ckpt.checkpoint.head import Head
from vraxion_ckpt.checkpoint.invariants import shared_names
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.plain_data import size_of
from vraxion_ckpt.errors import memory_errors
from vraxion_ckpt.plugins.discovery import AdapterLike
from vraxion_ckpt.reading.opening import PathLike, bound_if_possible, read_unbound
from vraxion_ckpt.reading.read_options import ReadKeywords, ReadOptions
from vraxion_ckpt.support import progress
from vraxion_ckpt.support.garbage import rare_collections


@memory_errors()
@rare_collections()
def diff(a: PathLike, b: PathLike, *, from_b: AdapterLike | None = None, **reading: Unpack[ReadKeywords]) -> Difference:
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
    options = ReadOptions.of("diff", reading)
    one = read_unbound(a, options, may_lack_keys=True)
    other = read_unbound(b, replace(options, from_=from_b), may_lack_keys=True)
    refuse_missing(options.drop_keys, one, other)
    found = diff_checkpoints(one, other, options)
    for checkpoint in (one, other):
        checkpoint.sources.verify()
        checkpoint.sources.check_unchanged()
    return found


def diff_checkpoints(a: Checkpoint, b: Checkpoint, options: ReadOptions) -> Difference:
    """Compare two opened checkpoints."""
    a.open_experts()
    b.open_experts()
    (a, refused_a), (b, refused_b) = (bound_if_possible(c, options) for c in (a, b))
    a, notes = as_stated_by(b, a)
    b, more_notes = as_stated_by(a, b)
    neighbours, neighbour_notes = neighbour_changes(a, b)
    not_bound = [f"{c.origin.path}: {why.message}" for c, why in ((a, refused_a), (b, refused_b)) if why]
    matching = match_experts(a.head, b.head)
    names = _names(a.head, b.head, matching)
    size = _size(b)
    with progress.progress_bar("comparing", size) as advance:
        model, tensors_identical = _model_changes(a, b, names, advance)
        optimizer, slots_identical = optimizer_changes(a, b, names, advance)
    sections: dict[str, list[Change]] = {
        "model": model,
        "optimizer": optimizer,
        "payload": list(value_changes(a.payload, b.payload)),
        "lifecycle": lifecycle_changes(a, b, matching),
        "history": _history_changes(a, b),
        "other": [
            *value_changes(_others(a), _others(b)),
            *_tie_changes(a, b, names),
            *_all_order_changes(a, b, names),
            *neighbours,
        ],
    }
    if not any(sections.values()):  # all values are equal; compare the format variants
        sections["other"] = _dialect_changes(a, b)
    if not any(sections.values()):
        lines = checkpoint_differences(a, b, same=lambda x, y: describe_value(x) == describe_value(y))
        sections["other"] = [Change(what="changed", before=line, after=line, old=None, new=None) for line in lines]
    return Difference(
        before=_side(a),
        after=_side(b),
        identical=not any(sections.values()),
        tensors_identical=tensors_identical,
        slots_identical=slots_identical,
        bytes_compared=size,
        experts=expert_changes(a, b, matching),
        ring=ring_change(a, b, matching),
        not_bound="; ".join(not_bound) or None,
        notes=(*notes, *more_notes, *neighbour_notes),
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
    return size_of([checkpoint.state_references(), slots])


def _names(a: Head | None, b: Head | None, matching: Matching) -> NameMap:
    known: dict[str, str | None] = {}
    pairs = matching.pairs
    for i, expert in a.experts.items() if a else ():
        for leaf in expert:
            assert a is not None
            known[a.prefix(i) + leaf] = b.prefix(pairs[i]) + leaf if b and i in pairs else None
    return lambda name: known.get(name, name)


def _model_changes(
    a: Checkpoint, b: Checkpoint, names: NameMap, advance: Callable[[int], object]
) -> tuple[list[Change], int]:
    old, new = a.state_references(), b.state_references()
    changes, identical, met = [], 0, set()
    for name, tensor in old.items():
        other = names(name)
        if other is None or other not in new:
            changes.append(removed(name, tensor))
            continue
        met.add(other)
        found = tensor_change(name, other, tensor, new[other])
        changes += [found] if found else []
        identical += found is None
        advance(new[other].nbytes)
    changes += [added(name, tensor) for name, tensor in new.items() if name not in met]
    return changes, identical


def _others(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the parts of a checkpoint that belong to no other section."""
    head = checkpoint.head
    return {
        "module versions": checkpoint.metadata,
        "planned split": vars(checkpoint.plan) if checkpoint.plan else None,
        "garbage-collected experts": sorted(head.deleted) if head else [],
    }


def _all_order_changes(a: Checkpoint, b: Checkpoint, names: NameMap) -> list[Change]:
    changes = order_changes(a.tensor_names(), b.tensor_names(), names, "model's tensors")
    if a.param_names is not None and b.param_names is not None:
        changes += order_changes(a.param_names, b.param_names, names, "param_names")
    return changes


def _tie_changes(a: Checkpoint, b: Checkpoint, names: NameMap) -> list[Change]:
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
    changes = [removed("memory under several names", ", ".join(sorted(tie))) for tie in old - new]
    return changes + [added("memory under several names", ", ".join(sorted(tie))) for tie in new - old]


def _dialect_changes(a: Checkpoint, b: Checkpoint) -> list[Change]:
    """Compare the format variants of two checkpoints of the same format, because a trainer may depend on them."""
    format_ = a.origin.format
    if format_ != b.origin.format:
        return []
    own = {**a.origin.local, **a.origin.dialects}, {**b.origin.local, **b.origin.dialects}
    if not (a.origin.is_ordered and b.origin.is_ordered):  # one states only the variant of its own format
        own = a.origin.dialect(format_), b.origin.dialect(format_)
    return list(value_changes({"spelling": own[0]}, {"spelling": own[1]}))


def _history_changes(a: Checkpoint, b: Checkpoint) -> list[Change]:
    """Compare two histories by their common prefix."""
    both = 0
    for one, other in zip(a.history, b.history, strict=False):
        if list(differences(one, other)):
            break
        both += 1
    return [
        *(removed(f"step {n + 1}", f"{r.name}: {r.summary}") for n, r in enumerate(a.history) if n >= both),
        *(added(f"step {n + 1}", f"{r.name}: {r.summary}") for n, r in enumerate(b.history) if n >= both),
    ]
