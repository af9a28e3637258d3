"""The data model of `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from vraxion_ckpt.analysis.tensor_facts import TensorFacts, TensorTree
from vraxion_ckpt.checkpoint.head import HeadKind
from vraxion_ckpt.checkpoint.load_balance import ExpertLoads
from vraxion_ckpt.checkpoint.optimizer_state import OptimizerForm
from vraxion_ckpt.checkpoint.provenance import Record
from vraxion_ckpt.plugins.adapter import Loss
from vraxion_ckpt.support.json_models import Fact, Facts, Number, Plain


class LifecycleFacts(Fact):
    """The lifecycle row of an expert. Steps are training steps."""

    contrib: int | Number
    created_step: int
    last_used_step: int
    tenured: bool
    age_steps: int | None
    probation: bool | None
    collected: bool
    """Whether a trainer lists the expert as garbage-collected although its tensors exist."""
    extra: Plain


class ExpertFacts(Fact):
    """One expert."""

    id: int
    deleted: bool
    """Whether the expert was garbage-collected: it has no tensors, but may own addresses."""
    addresses: int | None
    """Number of ring addresses that it owns; null without a ring."""
    share: float | None
    """Fraction of the ring that it owns; null without a ring."""
    lifecycle: LifecycleFacts | None
    """Null if no file records it."""
    bytes: int | None
    """Null if the expert was not opened; ``--tensors`` opens all."""
    tensors: dict[str, TensorFacts] | None
    """By leaf name; null as `bytes`."""
    zero: bool | None
    """Whether all weights are zero, as in a hibernated expert; null if the expert was not opened."""


class RingFacts(Fact):
    """The ring of addresses."""

    length: int
    arcs: int
    """Number of maximal runs of addresses with the same owner. A run may wrap around."""
    longest_arc: int
    owners: tuple[int, ...] | None
    """The owner of each address; null for more than 4,096 addresses."""


class GroupFacts(Fact):
    """One param group."""

    params: int
    options: Plain


class OptimizerPartFacts(Fact):
    """One of the optimizers of a file."""

    place: tuple[str | int, ...]
    """The keys under which the payload holds it. Empty if it is the only one and under the usual key."""
    form: OptimizerForm
    """How the file identifies parameters: ``numbered``, or by ``nested`` or ``flattened`` names."""
    parameters: int
    """Number of its parameters."""


class OptimizerFacts(Fact):
    """The optimizer's state."""

    bound: bool
    """Whether every id is bound to a parameter name. A chain requires this."""
    how: str
    """How the ids were bound and what was assumed, or why they could not be bound."""
    undecided: tuple[str, ...]
    """Names that may belong to other ids. A chain that changes one of them is refused."""
    order: str | None
    """The rule that explains the order of the parameters; null if no rule or several rules do, or if torch loads the
    optimizer by name."""
    parameters: int
    with_state: int
    slots: tuple[str, ...]
    bytes: int
    groups: tuple[GroupFacts, ...]
    """The groups of all optimizers, one after the other."""
    parts: tuple[OptimizerPartFacts, ...]


class PlanFacts(Fact):
    """A planned split that was not yet executed."""

    parent: int
    addresses: tuple[int, ...]
    arc: tuple[int, int]
    """Start and length of the arc."""
    policy: str
    metrics: Plain
    note: str
    """Assumptions about the visits that the plan is based on."""


class CoreFacts(Fact):
    """The model outside the head's experts."""

    tensors: int
    bytes: int


class UnknownExperts(Fact):
    """Tensors whose names look like experts in an unknown layout. They are treated as ordinary tensors."""

    tensors: int
    """Number of these tensors."""
    example: str
    """Name of the first one."""


class NeighbourFacts(Fact):
    """A file beside the checkpoint's own that belongs to it."""

    bytes: int
    holds: str
    """What it holds that the format does not read, such as training state; empty if nothing."""


class Inspection(Facts):
    """The facts about a checkpoint."""

    kind_of_facts: ClassVar[str] = "inspect"

    path: Path
    format: str
    dialect: str
    """The variant of the format, in words."""
    files: int
    bytes_on_disk: int
    """Bytes of its files. Foreign files in its directory do not count."""
    neighbours: dict[str, NeighbourFacts]
    """The files beside the weights, such as a tokenizer, by path relative to the checkpoint."""
    step: Plain
    core: CoreFacts
    payload: tuple[str, ...]
    """Keys of the entries that are neither the model nor the optimizer."""
    head: HeadKind | None
    num_experts: int
    experts: tuple[ExpertFacts, ...]
    unknown_experts: UnknownExperts | None
    """Null if there are none besides the head's experts."""
    ring: RingFacts | None
    signs: ExpertLoads | None
    """The load of the experts; null unless visits were given."""
    optimizer: OptimizerFacts | None
    plan: PlanFacts | None
    history: tuple[Record, ...]
    losses: dict[str, tuple[Loss, ...]]
    """The parts that each format cannot hold."""
    tensors: TensorTree | None
    """Null unless tensors were requested."""
