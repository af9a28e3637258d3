"""Collect the facts about a checkpoint.

By default, tensor data is read only until an expert has a non-zero weight.
"""

from __future__ import annotations

import re
import warnings
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from vraxion_ckpt.analysis.expert_load import expert_loads
from vraxion_ckpt.analysis.inspection_facts import (
    CoreFacts,
    ExpertFacts,
    GroupFacts,
    Inspection,
    LifecycleFacts,
    NeighbourFacts,
    OptimizerFacts,
    OptimizerPartFacts,
    PlanFacts,
    RingFacts,
    UnknownExperts,
)
from vraxion_ckpt.analysis.tensor_facts import tensor_facts, tensor_tree
from vraxion_ckpt.checkpoint import ring
from vraxion_ckpt.checkpoint.expert_health import HOW_TO_RESTORE, is_zero
from vraxion_ckpt.checkpoint.invariants import router_owners
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle, UnboundCheckpoint, unbound_state_dict
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer
from vraxion_ckpt.checkpoint.plain_data import size_of
from vraxion_ckpt.errors import BindingError, CkptWarning, UsageError, memory_errors, raise_if_out_of_memory
from vraxion_ckpt.optimizer import binding
from vraxion_ckpt.optimizer.parameter_order import explain
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Loss
from vraxion_ckpt.plugins.discovery import adapters
from vraxion_ckpt.plugins.options import configure
from vraxion_ckpt.reading.opening import PathLike, detect_source, files_of, os_errors_named, read_unbound
from vraxion_ckpt.reading.read_options import ReadKeywords, ReadOptions
from vraxion_ckpt.support.garbage import rare_collections
from vraxion_ckpt.wording import numbered

# Opening an expert may mean opening a file. Unless tensors are listed, no more experts are opened.
_MOST_OPENED = 16
_MOST_OWNERS = 4096
# The name of a module of experts, such as `mlp.experts.0.w1.weight`, `mlp.shared_expert.up_proj.weight`,
# `ffn.local_experts.3.weight`, `experts.expert_7.wi.weight`.
_EXPERT_MODULE = re.compile(r"(?:^|\.)(?:\w+_)?experts?(?:_?\d+)?\.", re.IGNORECASE)


@memory_errors()
@rare_collections()
def inspect(
    path: PathLike,
    *,
    tensors: bool = False,
    values: bool = False,
    visits: PathLike | None = None,
    visits_after: PathLike | None = None,
    against: PathLike | None = None,
    **reading: Unpack[ReadKeywords],
) -> Inspection:
    """Collect the facts about a checkpoint. An optimizer that cannot be bound to parameter names is not an error.

    Args:
        path: a file or a directory.
        tensors: list every tensor. This opens all experts.
        values: list every tensor with the range of its values. This reads all tensors.
        visits: a file of visits counted before a split, see `vraxion_ckpt.checkpoint.visits`.
        visits_after: a file of visits counted after training was resumed.
        against: the checkpoint before the split. If None, it is derived from the last split that the payload records.
        reading: see `ReadOptions`.

    Returns:
        The facts.

    Raises:
        UsageError: the path does not exist, or an option is wrong.
        SourceError: the checkpoint is damaged, unsafe, inconsistent or not supported.
        ChangedError: a file changed while its values were read.
    """
    if against is not None and visits is None and visits_after is None:
        raise UsageError("against needs visits or visits_after", path=against)
    options = ReadOptions.of("inspect", reading)
    checkpoint = read_unbound(path, options)
    why = ""
    try:
        checkpoint = binding.bind(checkpoint, options.param_names, options.optimizer_order)
    except BindingError as refused:
        why = str(refused)
    if tensors or values:
        checkpoint.open_experts()
    facts = Inspection(
        **_file_facts(checkpoint, path, options),
        step=checkpoint.payload.get("step"),
        core=CoreFacts(tensors=len(checkpoint.core), bytes=size_of(checkpoint.core)),
        payload=tuple(map(str, checkpoint.payload)),
        head=checkpoint.head.kind if checkpoint.head else None,
        num_experts=checkpoint.num_experts,
        experts=_expert_facts(checkpoint, opening=None if tensors or values else _MOST_OPENED),
        unknown_experts=_unknown_experts(checkpoint),
        ring=_ring_facts(checkpoint),
        signs=expert_loads(checkpoint, against=against, visits_file=visits, visits_after=visits_after),
        optimizer=_optimizer_facts(checkpoint, why),
        plan=_plan_facts(checkpoint),
        history=checkpoint.history,
        losses=_losses_by_format(checkpoint),
        tensors=tensor_tree(checkpoint, values=values) if tensors or values else None,
    )
    zero = [expert.id for expert in facts.experts if expert.zero]
    if zero:
        message = f"all weights of {numbered('expert', zero)} are zero; {HOW_TO_RESTORE}"
        warnings.warn(message, CkptWarning, stacklevel=2)
    if values:
        checkpoint.sources.verify()
        checkpoint.sources.check_unchanged()
    return facts


def _file_facts(checkpoint: Checkpoint, path: PathLike, options: ReadOptions) -> dict[str, Any]:
    root, name = checkpoint.origin.path or Path(path), checkpoint.origin.format
    with os_errors_named(path):
        kind = adapters().get(name)
        adapter = configure(kind, {}) if kind else detect_source(root, options.from_)
        files = files_of(adapter, root, checkpoint.origin.leftovers)
        return {
            "path": root,
            "format": name,
            "dialect": adapter_calls.dialect(adapter, checkpoint),
            "files": len(files),
            "bytes_on_disk": sum(file.stat().st_size for file in files),
            "neighbours": {
                neighbour.name: NeighbourFacts(bytes=(root / neighbour.name).stat().st_size, holds=neighbour.holds)
                for neighbour in checkpoint.origin.neighbours
            },
        }


def _expert_facts(checkpoint: Checkpoint, opening: int | None) -> tuple[ExpertFacts, ...]:
    head, router = checkpoint.head, checkpoint.router_reference
    if head is None:
        return ()
    counts = np.bincount(router_owners(router), minlength=head.num_experts).tolist() if router is not None else None
    length = router.numel() if router is not None else 0
    opened = set(islice(sorted(head.experts), opening))
    facts = []
    for i in sorted({*head.experts, *head.deleted}):
        row = checkpoint.lifecycle.get(i)
        expert = head.experts.get(i)
        held = expert.references() if expert is not None and i in opened else None
        facts.append(
            ExpertFacts(
                id=i,
                deleted=i in head.deleted,
                addresses=counts[i] if counts else None,
                share=counts[i] / length if counts else None,
                lifecycle=_lifecycle_facts(row) if row and not row.assumed else None,
                bytes=None if held is None else size_of(held),
                tensors=None if held is None else {leaf: tensor_facts(t) for leaf, t in held.items()},
                zero=is_zero(expert) if expert is not None and expert.is_open else None,
            )
        )
    return tuple(facts)


def _lifecycle_facts(row: Lifecycle) -> LifecycleFacts:
    return LifecycleFacts.model_validate(row, from_attributes=True)


def _unknown_experts(checkpoint: Checkpoint) -> UnknownExperts | None:
    names = [name for name in checkpoint.core if _EXPERT_MODULE.search(name)]
    return UnknownExperts(tensors=len(names), example=names[0]) if names else None


def _ring_facts(checkpoint: Checkpoint) -> RingFacts | None:
    router = checkpoint.router_reference
    if router is None or checkpoint.head is None:
        return None  # the valid owners are unknown without a head
    owners = router_owners(router)
    starts = ring.arc_starts(owners)
    return RingFacts(
        length=len(owners),
        arcs=len(starts),
        longest_arc=int(ring.run_lengths(starts, len(owners)).max()),
        owners=tuple(owners.tolist()) if len(owners) <= _MOST_OWNERS else None,
    )


def _optimizer_facts(checkpoint: Checkpoint, why: str) -> OptimizerFacts | None:
    optimizer = checkpoint.optimizer
    unbound = unbound_state_dict(checkpoint)
    if optimizer is None and unbound is None:
        return None
    if unbound is not None:
        state, groups = unbound.references().get("state", {}), unbound.get("param_groups", [])
        sizes = [len(group["params"]) for group in groups]
        options = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in groups]
    else:
        assert optimizer is not None
        state = optimizer.state.references()
        sizes = [len(group.params) for group in optimizer.groups]
        options = [group.options for group in optimizer.groups]
    return OptimizerFacts(
        bound=optimizer is not None,
        how=optimizer.bound_by if optimizer else why,
        undecided=tuple(sorted(optimizer.undecided)) if optimizer else (),
        order=_order_rule(optimizer, checkpoint) if optimizer else None,
        parts=_part_facts(checkpoint),
        parameters=sum(sizes),
        with_state=len(state),
        slots=tuple(sorted({str(slot) for slots in state.values() for slot in slots})),
        bytes=size_of(state),
        groups=tuple(GroupFacts(params=n, options=o) for n, o in zip(sizes, options, strict=True)),
    )


def _part_facts(checkpoint: Checkpoint) -> tuple[OptimizerPartFacts, ...]:
    """Return where the file has its optimizers. Without a place, an optimizer is under the usual key of the format."""
    optimizer = checkpoint.optimizer
    if isinstance(checkpoint, UnboundCheckpoint):
        unbound = checkpoint.unbound
        groups = unbound.state_dict.get("param_groups", [])
        numbers = unbound.part_of_group or (0,) * len(groups)
        sizes = [(number, len(group["params"])) for number, group in zip(numbers, groups, strict=True)]
        parts = unbound.parts
    else:
        assert optimizer is not None
        sizes = [(group.part, len(group.params)) for group in optimizer.groups]
        parts = optimizer.parts
    return tuple(
        OptimizerPartFacts(
            place=part.place, form=part.form, parameters=sum(size for number, size in sizes if number == i)
        )
        for i, part in enumerate(parts)
    )


def _order_rule(optimizer: Optimizer, checkpoint: Checkpoint) -> str | None:
    """Return the rule that explains the order of all parameters, or None if there is none, or several.

    Optimizers that torch loads by name have no order.
    """
    found: set[str] = set()
    for one in optimizer.each_part():
        (part,) = one.parts
        if not part.is_by_name:
            rules = part.rules if part.rules is not None else explain(one, checkpoint)
            found |= set(map(str, rules)) or {"", " "}
    return found.pop() if len(found) == 1 else None


def _plan_facts(checkpoint: Checkpoint) -> PlanFacts | None:
    plan = checkpoint.plan
    if plan is None:
        return None
    return PlanFacts(
        parent=plan.parent,
        addresses=plan.addresses,
        arc=plan.arc,
        policy=plan.policy,
        metrics=dict(plan.metrics),
        note=plan.note,
    )


def _losses_by_format(checkpoint: Checkpoint) -> dict[str, tuple[Loss, ...]]:
    """Return what each format, with default options, cannot hold. Warn about a format that fails, and leave it out."""
    lost: dict[str, tuple[Loss, ...]] = {}
    for name, adapter in sorted(adapters().items()):
        try:
            usual = configure(adapter, {})
            lost[name] = (
                *adapter_calls.losses(usual, checkpoint),
                *adapter_calls.lost_neighbours(usual, checkpoint),
            )
        except Exception as error:  # a required option or a defect must not hide the other facts
            raise_if_out_of_memory(error)
            warnings.warn(f"format {name} could not list its losses: {error}", CkptWarning, stacklevel=3)
    return lost
