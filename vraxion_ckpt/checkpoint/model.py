"""The canonical checkpoint: one in-memory form that every adapter reads into and writes from.

Nothing here belongs to one file format. Tensors are usually mapped from their file, not read; nobody ever
writes into one. A transform works on a `Checkpoint.copy` and replaces entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vraxion_ckpt.checkpoint.head_names import VRAXION, HeadNames
from vraxion_ckpt.checkpoint.order_rules import Rule
from vraxion_ckpt.checkpoint.source_files import Sources
from vraxion_ckpt.support import progress


class HeadKind(StrEnum):
    """Which of its two modules the model's output head is."""

    SINGLE = "single"
    EXPERTS = "experts"


TensorState = tuple[int, int, torch.dtype, torch.Size, tuple[int, ...], bool]


def tensor_state(tensor: Tensor) -> TensorState:
    """Return what changes when a tensor is written into as torch counts it, or gets other data or another shape."""
    place = tensor.data_ptr() if tensor.numel() else 0
    return tensor._version, place, tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad


class Expert(Mapping[str, Tensor]):
    """One expert's tensors by leaf name (``weight``, ``down.bias``), opened at the first look.

    Two experts that are the same object are the same tensors; so whether an expert is untouched can be told
    without opening it. Hence it cannot be changed, only replaced by another.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]) -> None:
        self._open = tensors if callable(tensors) else None
        self._tensors: dict[str, Tensor] | None = None
        self._states: list[TensorState] = []
        if not callable(tensors):
            self._take(tensors)

    def open_through(self, call: Callable[[Callable[[], Mapping[str, Tensor]]], Mapping[str, Tensor]]) -> None:
        """Let a function call what opens the file, and return what that returned; nothing if it is open already."""
        if self._open is not None and self._tensors is None:
            self._open = partial(call, self._open)

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._states = [tensor_state(tensor) for tensor in self._tensors.values()]

    @property
    def is_open(self) -> bool:
        """Tell whether the tensors are at hand without opening a file."""
        return self._tensors is not None

    @property
    def was_written_into(self) -> bool:
        """Tell whether somebody has changed a tensor since it was opened or made, see `tensor_state`."""
        return self._tensors is not None and self._states != [tensor_state(t) for t in self._tensors.values()]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors in state-dict order; opens them."""
        if self._tensors is None:
            assert self._open is not None
            self._take(self._open())
            assert self._tensors is not None
        return MappingProxyType(self._tensors)

    def __getitem__(self, leaf: str) -> Tensor:
        return self.tensors[leaf]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> Expert:
        """Return an expert with copies of the tensors, which lie elsewhere; a closed one opens the same file."""
        return Expert(deepcopy(self._tensors, memo) if self._tensors is not None else self._open or {})

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@dataclass
class Head:
    """The output head: one module, or one per expert.

    Attributes:
        kind: SINGLE has exactly one expert, id 0.
        experts: by id, in state-dict order.
        position: how many core tensors stand before the head in state-dict order.
        deleted: ids whose tensors were garbage-collected; they still count, and may still own addresses.
    """

    kind: HeadKind
    experts: dict[int, Expert]
    position: int
    deleted: frozenset[int] = frozenset()
    names: HeadNames = VRAXION

    @property
    def num_experts(self) -> int:
        """How many experts the router may name, garbage-collected ones included."""
        return len(self.experts) + len(self.deleted)

    def prefix(self, expert: int) -> str:
        """Return what stands before an expert's leaf names in the state dict."""
        return self.names.single if self.kind is HeadKind.SINGLE else f"{self.names.experts}{expert}."

    def is_not_at_hand(self, name: str) -> bool:
        """Tell whether a state-dict name is of an expert that is not open, or was garbage-collected."""
        if self.kind is HeadKind.SINGLE:
            return name.startswith(self.names.single) and not self.experts[0].is_open
        number = name.removeprefix(self.names.experts).partition(".")[0]
        if not number.isdecimal() or len(number) > 9 or not name.startswith(f"{self.names.experts}{int(number)}."):
            return False
        expert = self.experts.get(int(number))
        return int(number) in self.deleted if expert is None else not expert.is_open

    def copy(self) -> Head:
        """Return a head whose dict of experts may be changed freely."""
        return replace(self, experts=dict(self.experts))


@dataclass
class ParamGroup:
    """One optimizer param group with its parameters by name.

    Attributes:
        options: learning rate and whatever else the group holds, without the parameters.
        params: parameter names, in optimizer order.
        keys: the order in which the group's entries were found, ``params`` and ``param_names`` among them;
            ``param_names`` is emitted only if it is listed here.
    """

    options: dict[str, Any]
    params: list[str]
    keys: tuple[str, ...] = ()


@dataclass
class Optimizer:
    """An optimizer's state by parameter name instead of by position.

    Attributes:
        groups: the param groups, in order.
        state: slots (``exp_avg``, ``momentum_buffer``, ``step``, …) of every parameter that has any.
        extra: further entries of the optimizer's state dict.
        bound_by: how the names were found, and what was assumed, for people.
        undecided: names that may belong to other ids, or to none, as far as can be told. Their state stays with its
            position; a chain that changes one of them is refused.
        rules: those that explain the order of the parameters, or None as long as nobody has asked.
        prefixes: what stands before every name in the file's param groups, and what before it in the model
            (``module.`` and nothing, for an optimizer of a wrapped model).
    """

    groups: list[ParamGroup]
    state: dict[str, dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)
    bound_by: str = "names"
    undecided: frozenset[str] = frozenset()
    rules: tuple[Rule, ...] | None = None
    prefixes: tuple[str, str] = ("", "")

    @property
    def params(self) -> list[str]:
        """Every parameter name, through the groups: the order of the ids on disk."""
        return [name for group in self.groups for name in group.params]

    def copy(self) -> Optimizer:
        """Return an optimizer whose lists and dicts may be changed freely; slots' values are shared."""
        return replace(
            self,
            groups=[replace(g, options=dict(g.options), params=list(g.params)) for g in self.groups],
            state={name: dict(slots) for name, slots in self.state.items()},
        )


@dataclass(frozen=True)
class UnboundOptimizer:
    """An optimizer as torch writes it, its parameters numbered.

    Attributes:
        state_dict: what ``Optimizer.state_dict()`` returned.
        names: every parameter's name in optimizer order, where an earlier conversion recorded it.
        digest: of the state that the recorded names were for, see `vraxion_ckpt.checkpoint.torch_optimizer.digest`.
        undecided: those of the recorded names that were not certain, see `Optimizer`.
    """

    state_dict: dict[str, Any]
    names: tuple[str, ...] | None = None
    digest: str | None = None
    undecided: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Ancestor:
    """What tensors of a changed head come from.

    Attributes:
        prefix: what stood before their leaf names in the state dict before the step; or one tensor's whole name.
        noise: standard deviation of each noise that was added, and what its generator was seeded with before the
            leaf name; empty for an exact copy.
    """

    prefix: str
    noise: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Lifecycle:
    """One expert's bookkeeping row. Steps are training steps.

    Attributes:
        age_steps: present where a trainer wrote it, as is `probation`.
        extra: entries of the row that we do not know.
        collected: a trainer lists the expert as garbage-collected, although its tensors are there and are loaded.
        assumed: no file states the row; a reader made it up. Comparisons ignore it.
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
        """Return the row of an expert of which no file states one, in a checkpoint of training step `step`."""
        return cls(created_step=step, last_used_step=step, assumed=True)

    @classmethod
    def fresh(cls, step: int, like: Lifecycle | None = None) -> Lifecycle:
        """Return the row of an expert born at `step`, with the optional entries that `like` has."""
        return cls(
            created_step=step,
            last_used_step=step,
            age_steps=None if like is None or like.age_steps is None else 0,
            probation=None if like is None or like.probation is None else True,
        )


@dataclass(frozen=True)
class SplitPlan:
    """Which expert to split, and which of its addresses the child takes.

    Attributes:
        arc: start and length of the ring window the addresses were chosen from; it may wrap.
        addresses: in arc order.
        metrics: figures about the choice, as in ``mitosis_meta_v1``.
        step: the training step of the checkpoint it was made for.
        note: what the visits depend on that it was made from, see `vraxion_ckpt.checkpoint.ring.Visits`.
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


@dataclass(frozen=True)
class Record:
    """One line of a checkpoint's history: what was done to it, by what, from what."""

    name: str
    options: Mapping[str, Any]
    distribution: str
    version: str
    source: str
    summary: str


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint came from, and the dialects it has been seen in.

    Attributes:
        dialects: by format name, what that format's writer needs to speak as the source did. An adapter reads
            and replaces its own entry and carries the others along. Plain JSON-like values.
        local: what only a writer of the same format has a use for; not carried into others.
        leftovers: files of the format in the checkpoint's directory that no loader looks at, by their path below it:
            shards that an earlier save has left. An edit in place keeps them, unless a new file takes the name.
    """

    format: str = ""
    path: Path | None = None
    dialects: Mapping[str, Any] = field(default_factory=dict)
    local: Mapping[str, Any] = field(default_factory=dict)
    leftovers: tuple[str, ...] = ()

    def dialect(self, name: str) -> Any:
        """Return the dialect that is recorded for a format, or None."""
        return self.dialects.get(name)

    def with_dialect(self, name: str, dialect: Any) -> Origin:
        """Return an origin that records a format's dialect under the format's name."""
        return replace(self, dialects={**self.dialects, name: dialect})

    def without_dialects(self, *names: str) -> Origin:
        """Return an origin without the dialects of these formats."""
        return replace(self, dialects={name: each for name, each in self.dialects.items() if name not in names})


@dataclass
class Checkpoint:
    """A checkpoint in canonical form.

    Attributes:
        core: every model tensor outside the head's experts, in state-dict order.
        head: the output head, or None for a model without one.
        optimizer: state by parameter name, or None. See `UnboundCheckpoint` for one without names.
        payload: everything else, untouched and in order (``step``, ``losses``, ``scaler``, unknown keys).
            ``num_experts`` of a model with a head, and ``param_names``, are not in it: they follow from the rest.
        param_names: the model's parameters in ``named_parameters()`` order, where that is known.
        metadata: the state dict's ``_metadata`` (module versions), or None.
        lifecycle: one row an expert, garbage-collected ones included.
        plan: a split that was planned and not yet carried out.
        ancestors: for each prefix of tensors that a step has renamed or made of others, of which. The functions of
            `vraxion_ckpt.experts.surgery` fill it in; from it follows what becomes of all else that names
            the head's tensors (`vraxion_ckpt.optimizer.placement`, `vraxion_ckpt.experts.companion_updates`). Empty
            between steps.
    """

    core: dict[str, Tensor]
    head: Head | None = None
    optimizer: Optimizer | None = None
    payload: dict[str, Any] = field(default_factory=dict)
    param_names: tuple[str, ...] | None = None
    metadata: dict[str, Any] | None = None
    lifecycle: dict[int, Lifecycle] = field(default_factory=dict)
    plan: SplitPlan | None = None
    history: tuple[Record, ...] = ()
    origin: Origin = Origin()
    sources: Sources = field(default_factory=Sources)
    ancestors: dict[str, Ancestor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """How many experts the head has; 0 without a head."""
        return self.head.num_experts if self.head else 0

    @property
    def router_map(self) -> Tensor | None:
        """The owner of every ring address, shape ``[L]``, or None if the model has no ring.

        Assigning a tensor replaces the entry of `core`; the old tensor is not written into. A new entry is the last
        of `core`.

        Raises:
            ValueError: what is assigned is not a tensor of whole numbers of shape ``[L]``, L ≥ 1.
        """
        return self.core.get(self._router_name)

    @router_map.setter
    def router_map(self, owners: Tensor) -> None:
        if not isinstance(owners, Tensor):
            raise ValueError(f"router_map must be a tensor, not a {type(owners).__name__}")
        if owners.ndim != 1 or not len(owners):
            raise ValueError(f"router_map must have the shape [L], L ≥ 1, not {list(owners.shape)}")
        if owners.dtype is torch.bool or owners.is_floating_point() or owners.is_complex():
            raise ValueError(f"router_map must hold whole numbers, not {owners.dtype}")
        self.core[self._router_name] = owners

    @property
    def _router_name(self) -> str:
        return (self.head.names if self.head else VRAXION).router_map

    @property
    def step(self) -> int:
        """The training step, 0 where it is not known."""
        return self.known_step or 0

    @property
    def known_step(self) -> int | None:
        """The training step, or None where the payload has none that is a whole number ≥ 0."""
        step = self.payload.get("step")
        return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None

    def former_name(self, name: str) -> str:
        """Return what a tensor, or the one that it was made of, was called before the step."""
        for end in (i + 1 for i, char in enumerate(name) if char == "." or i == len(name) - 1):
            if name[:end] in self.ancestors:
                return self.ancestors[name[:end]].prefix + name[end:]
        return name

    @property
    def has_no_rows(self) -> bool:
        """Whether every lifecycle row is the one that a reader assumes, so that none need be written."""
        unknown = Lifecycle.unknown(self.step)
        return all(row.assumed and row == unknown for row in self.lifecycle.values())

    def open_experts(self) -> None:
        """Open the files of all experts that have files of their own."""
        closed = [expert for expert in self.head.experts.values() if not expert.is_open] if self.head else []
        with progress.progress_bar("opening", len(closed), "experts") as count:
            for expert in closed:
                _ = expert.tensors
                count(1)

    def open_tensors(self) -> dict[str, Tensor]:
        """Return the model's tensors that are at hand without opening a file: the core first, then open experts."""
        tensors = dict(self.core)
        for i, expert in self.head.experts.items() if self.head else ():
            if self.head and expert.is_open:
                tensors.update((self.head.prefix(i) + leaf, tensor) for leaf, tensor in expert.items())
        return tensors

    def tensor_names(self) -> list[str]:
        """Return every model tensor's name in state-dict order; opens the experts."""
        return list(self.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's tensors in state-dict order; opens the experts."""
        if self.head is None:
            return dict(self.core)
        core = list(self.core.items())
        experts = (
            (self.head.prefix(expert) + leaf, tensor)
            for expert, tensors in self.head.experts.items()
            for leaf, tensor in tensors.items()
        )
        return dict([*core[: self.head.position], *experts, *core[self.head.position :]])

    def copy(self) -> Checkpoint:
        """Return a checkpoint whose containers may be changed freely; tensors are shared."""
        return replace(
            self,
            core=dict(self.core),
            head=self.head.copy() if self.head else None,
            optimizer=self.optimizer.copy() if self.optimizer else None,
            payload=dict(self.payload),
            metadata=dict(self.metadata) if self.metadata is not None else None,
            lifecycle=dict(self.lifecycle),
            ancestors={},
        )

    def with_optimizer(self, optimizer: Optimizer | None) -> Checkpoint:
        """Return the checkpoint with an optimizer that is bound to parameter names, or without one."""
        kept = {each.name: getattr(self, each.name) for each in fields(Checkpoint)}
        return Checkpoint(**{**kept, "optimizer": optimizer})

    def with_unbound(self, unbound: UnboundOptimizer) -> UnboundCheckpoint:
        """Return the checkpoint with an optimizer that is not bound to parameter names."""
        kept = {each.name: getattr(self, each.name) for each in fields(Checkpoint)}
        return UnboundCheckpoint(**{**kept, "optimizer": None}, unbound=unbound)

    def without_training_state(self, *, keep_dialect: str) -> Checkpoint:
        """Return the model alone: without optimizer, payload, stated lifecycle rows and split plan.

        Dialects tell how other formats wrote that state, so they go with it.

        Args:
            keep_dialect: the one format whose dialect stays.
        """
        had_state = isinstance(self, UnboundCheckpoint) or self.optimizer is not None or bool(self.payload)
        others = [name for name in self.origin.dialects if name != keep_dialect] if had_state else []
        return replace(
            self.with_optimizer(None),
            payload={},
            lifecycle=dict.fromkeys(self.lifecycle, Lifecycle.unknown(0)),
            plan=None,
            origin=self.origin.without_dialects(*others),
        )


@dataclass
class UnboundCheckpoint(Checkpoint):
    """A checkpoint as an adapter reads it, with an optimizer whose parameters are numbered and have no names yet.

    `vraxion_ckpt.optimizer.binding` turns it into a `Checkpoint`. Transforms never get one.
    """

    unbound: UnboundOptimizer = field(kw_only=True)


def unbound_state_dict(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the state dict of an optimizer that is not bound to parameter names yet, or None."""
    return checkpoint.unbound.state_dict if isinstance(checkpoint, UnboundCheckpoint) else None
