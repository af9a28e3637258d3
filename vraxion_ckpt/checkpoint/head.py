"""The output head of a model and its experts. Imports without torch."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vraxion_ckpt.checkpoint.head_names import RING_HEAD, HeadNames, split_names
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict

if TYPE_CHECKING:
    from torch import Tensor

    Leaves = Mapping[str, TensorRef | Tensor]


class HeadKind(StrEnum):
    """Whether the head is a single module or a list of experts."""

    SINGLE = "single"
    EXPERTS = "experts"


class Expert(Mapping[str, "Tensor"]):
    """One expert's tensors by leaf name (``weight``, ``down.bias``), opened on first access.

    An expert cannot be changed, only replaced by another. Experts are compared by identity, so an untouched expert is
    recognised without opening it.
    """

    def __init__(self, tensors: Leaves | Callable[[], Leaves]) -> None:
        self._open = tensors if callable(tensors) else None
        self._tensors: TensorDict[str, Tensor] | None = None if callable(tensors) else TensorDict(tensors)

    def open_through(self, call: Callable[[Callable[[], Leaves]], Leaves]) -> None:
        """Open the expert through `call` when its tensors are needed. An open expert is not affected.

        Args:
            call: gets the function that opens the file, calls it and returns the tensors. It may convert exceptions.
        """
        if self._open is not None and self._tensors is None:
            self._open = partial(call, self._open)

    @property
    def is_open(self) -> bool:
        """Whether the tensors are available without opening a file."""
        return self._tensors is not None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by leaf name, in state-dict order. Opens a closed expert."""
        return MappingProxyType(self._opened())

    def references(self) -> dict[str, TensorRef]:
        """Return the references of the tensors by leaf name, in state-dict order. Opens a closed expert."""
        return self._opened().references()

    def as_stored(self) -> dict[str, Any]:
        """Return the tensors at which somebody has looked, and references of the others. Opens a closed expert."""
        return self._opened().as_stored()

    def _opened(self) -> TensorDict[str, Tensor]:
        if self._tensors is None:
            assert self._open is not None
            self._tensors = TensorDict(self._open())
        return self._tensors

    def __getitem__(self, leaf: str) -> Tensor:
        return self.tensors[leaf]

    def __contains__(self, leaf: object) -> bool:
        return leaf in self._opened()

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened())

    def __len__(self) -> int:
        return len(self._opened())

    def __reduce__(self) -> tuple[Any, ...]:
        return Expert, (dict(self),)

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
    names: HeadNames = RING_HEAD

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

    def unknown(self, listed: Sequence[str], tensors: Container[str]) -> list[str]:
        """Return the names that are neither in `tensors` nor belong to an expert that is not loaded."""
        if self.kind is HeadKind.EXPERTS:
            closed = {i for i, expert in self.experts.items() if not expert.is_open} | self.deleted
            split = split_names(tuple(listed), self.names)
            names = (self.prefix(i) + leaf for leaf, ids in split.experts.items() for i in ids - closed)
            if all(name in tensors for name in chain(split.others, names)):
                return []
        return [name for name in listed if name not in tensors and not self.is_not_loaded(name)]

    def copy(self) -> Head:
        """Return a head with its own dict of experts. The experts are shared."""
        return replace(self, experts=dict(self.experts))
