"""The canonical checkpoint: the in-memory form that every adapter reads into and writes from.

It is independent of file formats. Tensors are references until somebody looks at them, and are never written in place
(`vraxion_ckpt.checkpoint.references`). A transform works on a `Checkpoint.copy` and replaces entries. Imports without
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

from vraxion_ckpt.checkpoint.head import Head
from vraxion_ckpt.checkpoint.head_names import RING_HEAD
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, UnboundOptimizer
from vraxion_ckpt.checkpoint.provenance import Ancestor, Origin, Record
from vraxion_ckpt.checkpoint.references import TensorRef, reference
from vraxion_ckpt.checkpoint.source_files import Sources
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict, TensorDictField
from vraxion_ckpt.support import progress

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Lifecycle:
    """The lifecycle row of one expert, as trainers keep it. Steps are training steps.

    Attributes:
        contrib: the trainer's measure of the expert's contribution.
        age_steps: the expert's age, or None if the trainer does not write it.
        probation: whether the expert is on probation, or None if the trainer does not write it.
        extra: entries of the row with unknown keys.
        collected: whether the trainer lists the expert as garbage-collected although its tensors exist and are loaded.
        assumed: whether the reader made up the row because no file has one. Comparisons ignore this field.
    """

    contrib: int | float = 0.0
    created_step: int = 0
    last_used_step: int = 0
    tenured: bool = False
    age_steps: int | None = None
    probation: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    collected: bool = False
    assumed: bool = field(default=False, compare=False)

    @classmethod
    def unknown(cls, step: int) -> Lifecycle:
        """Return the row to assume for an expert without one, in a checkpoint of training step `step`."""
        return cls(created_step=step, last_used_step=step, assumed=True)

    @classmethod
    def fresh(cls, step: int, like: Lifecycle | None = None) -> Lifecycle:
        """Return the row of an expert created at `step`, with the optional entries that `like` has."""
        return cls(
            created_step=step,
            last_used_step=step,
            age_steps=None if like is None or like.age_steps is None else 0,
            probation=None if like is None or like.probation is None else True,
        )


@dataclass(frozen=True)
class SplitPlan:
    """The expert to split, and the addresses that move to the child.

    Attributes:
        parent: id of the expert to split.
        addresses: the addresses that move, in arc order.
        arc: start and length of the arc from which the addresses were chosen. It may wrap.
        policy: how the addresses were chosen.
        router_map_len: number of ring addresses.
        num_experts: number of experts before the split.
        metrics: numbers that describe the choice, as in ``mitosis_meta_v1``.
        step: training step of the checkpoint for which the plan was made.
        note: the note of the visits from which the plan was made, see `vraxion_ckpt.checkpoint.ring.Visits`.
    """

    parent: int
    addresses: tuple[int, ...]
    arc: tuple[int, int]
    policy: str
    router_map_len: int
    num_experts: int
    metrics: Mapping[str, int | float] = field(default_factory=dict)
    step: int = 0
    note: str = ""


@dataclass
class Checkpoint:
    """A checkpoint in canonical form.

    Attributes:
        core: every model tensor outside the head's experts, in state-dict order. Any dict that is assigned becomes a
            `TensorDict`. The same holds for `payload`.
        head: the output head, or None for a model without one.
        optimizer: the optimizer's state by parameter name, or None. See `UnboundCheckpoint` for numbered parameters.
        payload: all other entries, unchanged and in order (``step``, ``losses``, ``scaler``, unknown keys). Writers
            compute ``param_names``, and ``num_experts`` of a model with a head, so the payload has neither.
        param_names: the model's parameters in ``named_parameters()`` order, or None if unknown.
        metadata: the state dict's ``_metadata`` (module versions), or None.
        lifecycle: one row for each expert, including garbage-collected ones.
        plan: a split that is planned but not done, or None.
        history: the steps that produced the checkpoint, oldest first.
        origin: the format and path from which it was read, and the dialects.
        sources: the files that were read.
        ancestors: the sources of the tensors that the current step has renamed or created, by their new prefix.
            `vraxion_ckpt.experts.surgery` fills it in. `vraxion_ckpt.optimizer.placement` and
            `vraxion_ckpt.experts.companion_updates` use it. Empty between steps.
    """

    core: TensorDictField[Tensor] = TensorDictField()
    head: Head | None = None
    optimizer: Optimizer | None = None
    payload: TensorDictField[Any] = TensorDictField(required=False)
    param_names: tuple[str, ...] | None = None
    metadata: dict[str, Any] | None = None
    lifecycle: dict[int, Lifecycle] = field(default_factory=dict)
    plan: SplitPlan | None = None
    history: tuple[Record, ...] = ()
    origin: Origin = field(default_factory=Origin)
    sources: Sources = field(default_factory=Sources)
    ancestors: dict[str, Ancestor] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():  # a pickle has plain dicts
            setattr(self, name, value)

    @property
    def num_experts(self) -> int:
        """The number of experts of the head, 0 without a head."""
        return self.head.num_experts if self.head else 0

    @property
    def router_map(self) -> Tensor | None:
        """The owner of every ring address, shape ``[L]``, or None if the model has no ring.

        Assigning a tensor replaces the entry of `core`, or appends it. The old tensor is not written in place.

        Raises:
            ValueError: the assigned value is not an integer tensor of shape ``[L]`` with L ≥ 1.
        """
        found: Tensor | None = self.core.get(self._router_name)
        return found

    @router_map.setter
    def router_map(self, owners: Tensor) -> None:
        if not hasattr(owners, "untyped_storage"):
            raise ValueError(f"router_map must be a tensor, not a {type(owners).__name__}")
        if owners.ndim != 1 or not len(owners):
            raise ValueError(f"router_map must have shape [L] with L ≥ 1, not {list(owners.shape)}")
        if reference(owners).dtype == "bool" or owners.is_floating_point() or owners.is_complex():
            raise ValueError(f"router_map must hold integers, not {owners.dtype}")
        self.core[self._router_name] = owners

    @property
    def router_reference(self) -> TensorRef | None:
        """The reference of `router_map`, or None if the model has no ring."""
        found: TensorRef | None = self.core.reference(self._router_name) if self._router_name in self.core else None
        return found

    @property
    def _router_name(self) -> str:
        return (self.head.names if self.head else RING_HEAD).router_map

    @property
    def step(self) -> int:
        """The training step, or 0 if unknown."""
        return self.known_step or 0

    @property
    def known_step(self) -> int | None:
        """The training step, or None if the payload has no ``step`` that is an integer ≥ 0."""
        step = self.payload.get("step")
        is_number = isinstance(step, Integral) and not isinstance(step, bool)  # of Python or numpy
        return int(step) if is_number and step >= 0 else None

    def former_name(self, name: str) -> str:
        """Return the name that a tensor, or the tensor from which it was created, had before the step."""
        for end in (i + 1 for i, char in enumerate(name) if char == "." or i == len(name) - 1):
            if name[:end] in self.ancestors:
                return self.ancestors[name[:end]].prefix + name[end:]
        return name

    @property
    def has_no_rows(self) -> bool:
        """Whether every lifecycle row is the one that the reader assumed. Then no row needs to be written."""
        unknown = Lifecycle.unknown(self.step)
        return all(row.assumed and row == unknown for row in self.lifecycle.values())

    def open_experts(self) -> None:
        """Open all closed experts."""
        closed = [expert for expert in self.head.experts.values() if not expert.is_open] if self.head else []
        with progress.progress_bar("opening", len(closed), "experts") as count:
            for expert in closed:
                _ = expert.tensors
                count(1)

    def open_references(self) -> dict[str, TensorRef]:
        """Return the references of the tensors of `open_tensors`."""
        found: dict[str, TensorRef] = self.core.references()
        for i, expert in self.head.experts.items() if self.head else ():
            if self.head and expert.is_open:
                prefix = self.head.prefix(i)
                found.update((prefix + leaf, tensor) for leaf, tensor in expert.references().items())
        return found

    def open_tensors(self) -> TensorDict[str, Tensor]:
        """Return the model tensors that are available without opening a file: the core, then the open experts."""
        return TensorDict(self.open_references())

    def tensor_names(self) -> list[str]:
        """Return the names of all model tensors in state-dict order. Opens the experts."""
        return list(self.state_references())

    def state_references(self) -> dict[str, TensorRef]:
        """Return the references of the tensors of `state_dict`. Opens the experts."""
        if self.head is None:
            return self.core.references()
        core = list(self.core.references().items())
        experts = (
            (self.head.prefix(i) + leaf, tensor)
            for i, expert in self.head.experts.items()
            for leaf, tensor in expert.references().items()
        )
        return dict([*core[: self.head.position], *experts, *core[self.head.position :]])

    def state_dict(self) -> TensorDict[str, Tensor]:
        """Return all model tensors in state-dict order. Opens the experts."""
        return TensorDict(self.state_references())

    def copy(self) -> Checkpoint:
        """Return a checkpoint with its own containers. Tensors are shared, and `ancestors` is empty."""
        return replace(
            self,
            core=TensorDict(self.core),
            head=self.head.copy() if self.head else None,
            optimizer=self.optimizer.copy() if self.optimizer else None,
            payload=TensorDict(self.payload),
            metadata=dict(self.metadata) if self.metadata is not None else None,
            lifecycle=dict(self.lifecycle),
            ancestors={},
        )

    def with_optimizer(self, optimizer: Optimizer | None) -> Checkpoint:
        """Return a checkpoint with this optimizer, or without one."""
        kept = {each.name: getattr(self, each.name) for each in fields(Checkpoint)}
        return Checkpoint(**{**kept, "optimizer": optimizer})

    def with_unbound(self, unbound: UnboundOptimizer) -> UnboundCheckpoint:
        """Return a checkpoint with an optimizer whose parameters are numbered."""
        kept = {each.name: getattr(self, each.name) for each in fields(Checkpoint)}
        return UnboundCheckpoint(**{**kept, "optimizer": None}, unbound=unbound)

    def without_training_state(self, *, keep_dialect: str) -> Checkpoint:
        """Return the model without optimizer, payload and split plan, and with assumed lifecycle rows.

        If there was an optimizer or a payload, dialects are removed too, because they describe how it was written.

        Args:
            keep_dialect: name of the format whose dialect is kept.
        """
        had_state = isinstance(self, UnboundCheckpoint) or self.optimizer is not None or bool(self.payload)
        others = [name for name in self.origin.dialects if name != keep_dialect] if had_state else []
        return replace(
            self.with_optimizer(None),
            payload=TensorDict(),
            lifecycle=dict.fromkeys(self.lifecycle, Lifecycle.unknown(0)),
            plan=None,
            origin=self.origin.without_dialects(*others),
        )


@dataclass
class UnboundCheckpoint(Checkpoint):
    """A checkpoint as an adapter reads it, with an optimizer whose parameters are numbered.

    `vraxion_ckpt.optimizer.binding` turns it into a `Checkpoint`. Transforms never receive one.
    """

    unbound: UnboundOptimizer = field(kw_only=True)


def unbound_state_dict(checkpoint: Checkpoint) -> TensorDict[str, Any] | None:
    """Return the state dict of an optimizer with numbered parameters, or None if the checkpoint has none."""
    return TensorDict(checkpoint.unbound.state_dict) if isinstance(checkpoint, UnboundCheckpoint) else None
