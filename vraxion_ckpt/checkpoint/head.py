"""The output head of a model and its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vraxion_ckpt.checkpoint.head_names import VRAXION, HeadNames


class HeadKind(StrEnum):
    """Whether the head is a single module or a list of experts."""

    SINGLE = "single"
    EXPERTS = "experts"


TensorState = tuple[int, int, torch.dtype, torch.Size, tuple[int, ...], bool]


def tensor_state(tensor: Tensor) -> TensorState:
    """Return a value that changes if torch counts an in-place write, or if address, dtype, shape or strides change."""
    address = tensor.data_ptr() if tensor.numel() else 0
    return tensor._version, address, tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad


class Expert(Mapping[str, Tensor]):
    """One expert's tensors by leaf name (``weight``, ``down.bias``), opened on first access.

    An expert cannot be changed, only replaced by another. Experts are compared by identity, so an untouched expert is
    recognised without opening it.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]) -> None:
        self._open = tensors if callable(tensors) else None
        self._tensors: dict[str, Tensor] | None = None
        self._states: list[TensorState] = []
        if not callable(tensors):
            self._take(tensors)

    def open_through(self, call: Callable[[Callable[[], Mapping[str, Tensor]]], Mapping[str, Tensor]]) -> None:
        """Open the expert through `call` when its tensors are needed. An open expert is not affected.

        Args:
            call: gets the function that opens the file, calls it and returns the tensors. It may convert exceptions.
        """
        if self._open is not None and self._tensors is None:
            self._open = partial(call, self._open)

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._states = [tensor_state(tensor) for tensor in self._tensors.values()]

    @property
    def is_open(self) -> bool:
        """Whether the tensors are available without opening a file."""
        return self._tensors is not None

    @property
    def was_written_into(self) -> bool:
        """Whether a tensor was written in place since the expert was opened or created, see `tensor_state`."""
        return self._tensors is not None and self._states != [tensor_state(t) for t in self._tensors.values()]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by leaf name, in state-dict order. Opens a closed expert."""
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
        """Return an expert with copies of the tensors. The copy of a closed expert opens the same file."""
        return Expert(deepcopy(self._tensors, memo) if self._tensors is not None else self._open or {})

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@dataclass
class Head:
    """The output head: a single module, or a list of experts.

    Attributes:
        kind: whether it is a single module or a list. A SINGLE head has exactly one expert, with id 0.
        experts: the experts that have tensors, by id, in state-dict order.
        position: number of core tensors before the head in state-dict order.
        deleted: ids of garbage-collected experts. They have no tensors, but count as experts and may own addresses.
        names: the state-dict names that the model family uses for its head.
    """

    kind: HeadKind
    experts: dict[int, Expert]
    position: int
    deleted: frozenset[int] = frozenset()
    names: HeadNames = VRAXION

    @property
    def num_experts(self) -> int:
        """The number of experts, including garbage-collected ones."""
        return len(self.experts) + len(self.deleted)

    def prefix(self, expert: int) -> str:
        """Return the prefix of an expert's tensors in the state dict."""
        return self.names.single if self.kind is HeadKind.SINGLE else f"{self.names.experts}{expert}."

    def is_not_loaded(self, name: str) -> bool:
        """Return whether a state-dict name belongs to an expert that is closed or garbage-collected."""
        if self.kind is HeadKind.SINGLE:
            return name.startswith(self.names.single) and not self.experts[0].is_open
        number = name.removeprefix(self.names.experts).partition(".")[0]
        if not number.isdecimal() or len(number) > 9 or not name.startswith(f"{self.names.experts}{int(number)}."):
            return False
        expert = self.experts.get(int(number))
        return int(number) in self.deleted if expert is None else not expert.is_open

    def copy(self) -> Head:
        """Return a head with its own dict of experts. The experts are shared."""
        return replace(self, experts=dict(self.experts))
