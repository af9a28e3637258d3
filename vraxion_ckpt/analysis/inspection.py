"""What a checkpoint is and holds, as facts.

Of a tensor's data, it reads no more than it takes to see that an expert is not all zero, unless asked to.
"""

from __future__ import annotations

import re
import warnings
from itertools import islice
from pathlib import Path
from typing import ClassVar, Unpack

import numpy as np
from torch import Tensor

from vraxion_ckpt.analysis.expert_load import expert_loads
from vraxion_ckpt.checkpoint import ring
from vraxion_ckpt.checkpoint.expert_health import HOW_TO_RESTORE, is_zero
from vraxion_ckpt.checkpoint.head import HeadKind
from vraxion_ckpt.checkpoint.invariants import router_owners
from vraxion_ckpt.checkpoint.load_balance import ExpertLoads
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle, unbound_state_dict
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer
from vraxion_ckpt.checkpoint.plain_data import as_numbers, dtype_name, in_pieces, named_tensors, size_of
from vraxion_ckpt.checkpoint.provenance import Record
from vraxion_ckpt.errors import BindingError, CkptWarning, UsageError, memory_errors, raise_if_out_of_memory
from vraxion_ckpt.optimizer import binding
from vraxion_ckpt.optimizer.parameter_order import explain
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Loss
from vraxion_ckpt.plugins.discovery import adapters
from vraxion_ckpt.plugins.options import configure
from vraxion_ckpt.reading.opening import PathLike, detect_source, files_of, os_errors_named, read_unbound
from vraxion_ckpt.reading.read_options import ReadKeywords, ReadOptions
from vraxion_ckpt.support import progress
from vraxion_ckpt.support.json_models import Fact, Facts, Number, Plain
from vraxion_ckpt.wording import numbered

# An expert may have a file of its own, which takes a while to open; no more are opened unless tensors are asked for.
MOST_OPENED = 16
_MOST_OWNERS = 4096
# A module that is called after experts, as in `mlp.experts.0.w1.weight`, `mlp.shared_expert.up_proj.weight`,
# `ffn.local_experts.3.weight`, `experts.expert_7.wi.weight`.
_EXPERT_MODULE = re.compile(r"(?:^|\.)(?:\w+_)?experts?(?:_?\d+)?\.", re.IGNORECASE)


class ValueFacts(Fact):
    """What a tensor's values are like."""

    minimum: int | Number | None
    """Of the finite values; null if there are none, and for complex numbers."""
    maximum: int | Number | None
    nans: int
    """How many are not a number."""
    infinities: int


class TensorFacts(Fact):
    """One tensor."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    values: ValueFacts | None = None
    """Null unless asked for."""


class TensorTree(Fact):
    """Every tensor by its name."""

    model: dict[str, TensorFacts]
    """In state-dict order."""
    optimizer: dict[str, TensorFacts]
    """Slots, called ``parameter:slot``; of an optimizer that is not bound, ``number:slot``."""
    payload: dict[str, TensorFacts]


class LifecycleFacts(Fact):
    """One expert's bookkeeping; steps are training steps."""

    contrib: int | Number
    created_step: int
    last_used_step: int
    tenured: bool
    age_steps: int | None
    probation: bool | None
    collected: bool
    """Listed as garbage-collected by a trainer, although its tensors are there."""
    extra: Plain


class ExpertFacts(Fact):
    """One expert."""

    id: int
    deleted: bool
    """Garbage-collected: it has no tensors any more, but may own addresses."""
    addresses: int | None
    """How many ring addresses it owns; null without a ring."""
    share: float | None
    """The same as a part of the ring."""
    lifecycle: LifecycleFacts | None
    """Null where no file states it."""
    bytes: int | None
    """Null where its file was not opened; ``--tensors`` opens all."""
    tensors: dict[str, TensorFacts] | None
    """By leaf name; null as `bytes`."""
    zero: bool | None
    """Whether all of its weights are zero, as those of a hibernated expert; null where its file was not opened."""


class RingFacts(Fact):
    """The ring of addresses."""

    length: int
    arcs: int
    """How many arcs of one owner it consists of, going round."""
    longest_arc: int
    owners: tuple[int, ...] | None
    """The owner of each address; null for more than 4,096."""


class GroupFacts(Fact):
    """One param group."""

    params: int
    options: Plain


class OptimizerFacts(Fact):
    """The optimizer's state."""

    bound: bool
    """Whether every position is bound to a parameter's name; only then can a chain carry it."""
    how: str
    """How it was bound and what was assumed, or why not."""
    undecided: tuple[str, ...]
    """Names that may belong to other positions; a chain that changes one of them is refused."""
    order: str | None
    """The rule that explains the order of the parameters; null if none does, or several."""
    parameters: int
    with_state: int
    slots: tuple[str, ...]
    bytes: int
    groups: tuple[GroupFacts, ...]


class PlanFacts(Fact):
    """A split that was planned and not yet carried out."""

    parent: int
    addresses: tuple[int, ...]
    arc: tuple[int, int]
    """Start and length."""
    policy: str
    metrics: Plain
    note: str
    """What the visits depend on that it was made from."""


class CoreFacts(Fact):
    """The model outside the head's experts."""

    tensors: int
    bytes: int


class UnknownExperts(Fact):
    """Tensors that look like experts, in a layout that is not known here; they are treated as ordinary tensors."""

    tensors: int
    example: str
    """The name of the first of them."""


class Inspection(Facts):
    """What a checkpoint is and holds."""

    kind_of_facts: ClassVar[str] = "inspect"

    path: Path
    format: str
    dialect: str
    """How its format is spelt, in words."""
    files: int
    bytes_on_disk: int
    """Of its own files; other people's files in its directory do not count."""
    step: Plain
    core: CoreFacts
    payload: tuple[str, ...]
    """The names of the further entries."""
    head: HeadKind | None
    num_experts: int
    experts: tuple[ExpertFacts, ...]
    unknown_experts: UnknownExperts | None
    """Null if the head's experts are the only ones."""
    ring: RingFacts | None
    signs: ExpertLoads | None
    """How visits fall on the experts; null unless visits were given."""
    optimizer: OptimizerFacts | None
    plan: PlanFacts | None
    history: tuple[Record, ...]
    losses: dict[str, tuple[Loss, ...]]
    """What each format would lose."""
    tensors: TensorTree | None
    """Null unless asked for."""


@memory_errors()
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
    """Look at a checkpoint; an optimizer that cannot be bound is a fact, not an error.

    Args:
        path: a file or a directory.
        tensors: list every tensor, and open the experts' files for that.
        values: with `tensors`, read them and tell minimum, maximum and what is not finite.
        visits: a file of visits that were counted before a split, see `vraxion_ckpt.checkpoint.visits`.
        visits_after: one of visits counted after training was resumed.
        against: the checkpoint before the split; if not given, what the payload records of the last split is undone.
        reading: what the files do not tell, see `ReadOptions`.

    Raises:
        UsageError: there is no such file, or an unknown format.
        SourceError: what is wrong with it, and where.
    """
    if against is not None and visits is None and visits_after is None:
        raise UsageError("against says what visits were counted on, and there are none", path=against)
    options = ReadOptions(**reading)
    checkpoint = read_unbound(path, options)
    why = ""
    try:
        checkpoint = binding.bind(checkpoint, options.param_names, options.optimizer_order)
    except BindingError as refused:
        why = str(refused)
    if tensors or values:
        checkpoint.open_experts()
    root = checkpoint.origin.path or Path(path)
    format_ = checkpoint.origin.format
    with os_errors_named(path):
        kind = adapters().get(format_)
        adapter = configure(kind, {}) if kind else detect_source(root, options.from_)
        files = files_of(adapter, root, checkpoint.origin.leftovers)
        dialect = adapter_calls.dialect(adapter, checkpoint)
        size = sum(file.stat().st_size for file in files)
    facts = Inspection(
        path=root,
        format=format_,
        dialect=dialect,
        files=len(files),
        bytes_on_disk=size,
        step=checkpoint.payload.get("step"),
        core=CoreFacts(tensors=len(checkpoint.core), bytes=size_of(checkpoint.core)),
        payload=tuple(map(str, checkpoint.payload)),
        head=checkpoint.head.kind if checkpoint.head else None,
        num_experts=checkpoint.num_experts,
        experts=_expert_facts(checkpoint, opening=None if tensors or values else MOST_OPENED),
        unknown_experts=_unknown_experts(checkpoint),
        ring=_ring_facts(checkpoint),
        signs=expert_loads(checkpoint, against=against, visits_file=visits, visits_after=visits_after),
        optimizer=_optimizer_facts(checkpoint, why),
        plan=_plan_facts(checkpoint),
        history=checkpoint.history,
        losses=_losses_by_format(checkpoint),
        tensors=_tree(checkpoint, values=values) if tensors or values else None,
    )
    zero = [expert.id for expert in facts.experts if expert.zero]
    if zero:
        message = f"all weights of {numbered('expert', zero)} are zero; {HOW_TO_RESTORE}"
        warnings.warn(message, CkptWarning, stacklevel=2)
    if values:
        checkpoint.sources.verify()
        checkpoint.sources.check_unchanged()
    return facts


def _expert_facts(checkpoint: Checkpoint, opening: int | None) -> tuple[ExpertFacts, ...]:
    head, router = checkpoint.head, checkpoint.router_map
    if head is None:
        return ()
    counts = np.bincount(router_owners(router), minlength=head.num_experts).tolist() if router is not None else None
    length = len(router) if router is not None else 0
    opened = set(islice(sorted(head.experts), opening))
    facts = []
    for i in sorted({*head.experts, *head.deleted}):
        row = checkpoint.lifecycle.get(i)
        expert = head.experts.get(i)
        held = expert.tensors if expert is not None and i in opened else None
        facts.append(
            ExpertFacts(
                id=i,
                deleted=i in head.deleted,
                addresses=counts[i] if counts else None,
                share=counts[i] / length if counts else None,
                lifecycle=_lifecycle_facts(row) if row and not row.assumed else None,
                bytes=None if held is None else size_of(dict(held)),
                tensors=None if held is None else {leaf: _tensor_facts(t) for leaf, t in held.items()},
                zero=is_zero(expert) if expert is not None and expert.is_open else None,
            )
        )
    return tuple(facts)


def _lifecycle_facts(row: Lifecycle) -> LifecycleFacts:
    return LifecycleFacts.model_validate({name: getattr(row, name) for name in LifecycleFacts.model_fields})


def _unknown_experts(checkpoint: Checkpoint) -> UnknownExperts | None:
    names = [name for name in checkpoint.core if _EXPERT_MODULE.search(name)]
    return UnknownExperts(tensors=len(names), example=names[0]) if names else None


def _ring_facts(checkpoint: Checkpoint) -> RingFacts | None:
    if checkpoint.router_map is None or checkpoint.head is None:
        return None  # without a head, nothing says what a router map may hold
    owners = router_owners(checkpoint.router_map)
    lengths = [length for _, length, _ in ring.arcs(owners)]
    return RingFacts(
        length=len(owners),
        arcs=len(lengths),
        longest_arc=max(lengths, default=0),
        owners=tuple(owners.tolist()) if len(owners) <= _MOST_OWNERS else None,
    )


def _optimizer_facts(checkpoint: Checkpoint, why: str) -> OptimizerFacts | None:
    optimizer = checkpoint.optimizer
    unbound = unbound_state_dict(checkpoint)
    if optimizer is None and unbound is None:
        return None
    if optimizer is None:
        saved = unbound or {}
        state, groups = saved.get("state", {}), saved.get("param_groups", [])
        sizes = [len(group["params"]) for group in groups]
        options = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in groups]
    else:
        state = optimizer.state
        sizes = [len(group.params) for group in optimizer.groups]
        options = [group.options for group in optimizer.groups]
    return OptimizerFacts(
        bound=optimizer is not None,
        how=optimizer.bound_by if optimizer else why,
        undecided=tuple(sorted(optimizer.undecided)) if optimizer else (),
        order=order_in_words(optimizer, checkpoint) if optimizer else None,
        parameters=sum(sizes),
        with_state=len(state),
        slots=tuple(sorted({str(slot) for slots in state.values() for slot in slots})),
        bytes=size_of(state),
        groups=tuple(GroupFacts(params=n, options=o) for n, o in zip(sizes, options, strict=True)),
    )


def order_in_words(optimizer: Optimizer, checkpoint: Checkpoint) -> str | None:
    """Return the rule that explains the order of an optimizer's parameters, or None if there is not exactly one."""
    rules = optimizer.rules if optimizer.rules is not None else explain(optimizer, checkpoint)
    return str(rules[0]) if len(rules) == 1 else None


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
    """Ask every format, with its default options, what it would lose; one that cannot tell is left out."""
    lost: dict[str, tuple[Loss, ...]] = {}
    for name, adapter in sorted(adapters().items()):
        try:
            lost[name] = tuple(adapter_calls.losses(configure(adapter, {}), checkpoint))
        except Exception as error:  # an option without a default, or a defect: no reason not to show the rest
            raise_if_out_of_memory(error)
            warnings.warn(f"format {name} does not say what it would lose: {error}", CkptWarning, stacklevel=3)
    return lost


# --- tensors ---


def _tree(checkpoint: Checkpoint, *, values: bool) -> TensorTree:
    optimizer: Optimizer | None = checkpoint.optimizer
    slots = optimizer.state if optimizer else (unbound_state_dict(checkpoint) or {}).get("state", {})
    kinds: dict[str, dict[str, Tensor]] = {
        "model": checkpoint.state_dict(),
        "optimizer": {
            f"{name}:{slot}": value
            for name, entries in slots.items()
            for slot, value in entries.items()
            if isinstance(value, Tensor)
        },
        "payload": dict(named_tensors(checkpoint.payload)),
    }
    facts: dict[str, dict[str, TensorFacts]] = {}
    with progress.progress_bar("reading", size_of(kinds) if values else 0) as count:
        for kind, tensors in kinds.items():
            facts[kind] = {}
            for name, tensor in tensors.items():
                facts[kind][name] = _tensor_facts(tensor, values=values)
                count(tensor.numel() * tensor.itemsize)
    return TensorTree.model_validate(facts)


def _tensor_facts(tensor: Tensor, *, values: bool = False) -> TensorFacts:
    return TensorFacts(
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        bytes=tensor.numel() * tensor.itemsize,
        values=value_facts(tensor) if values else None,
    )


def value_facts(tensor: Tensor) -> ValueFacts:
    """Read a tensor, a piece at a time, and tell its extremes and what in it is not finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        try:
            numbers = tensor.detach().numpy()
        except TypeError:  # a dtype of bits, which are no numbers
            numbers = np.empty(0)
        ends = (int(numbers.min()), int(numbers.max())) if numbers.size else (None, None)
        return ValueFacts(minimum=ends[0], maximum=ends[1], nans=0, infinities=0)
    nans = infinities = 0
    low, high = float("inf"), float("-inf")
    for (part,) in in_pieces(tensor):
        piece = as_numbers(part)
        if piece is None:
            break
        nan, finite = piece.isnan(), piece.isfinite()
        nans += int(nan.sum())
        infinities += int((~finite & ~nan).sum())
        if not piece.is_complex() and bool(finite.any()):
            kept = piece[finite]
            low, high = min(low, float(kept.min())), max(high, float(kept.max()))
    some = low <= high
    return ValueFacts(minimum=low if some else None, maximum=high if some else None, nans=nans, infinities=infinities)
