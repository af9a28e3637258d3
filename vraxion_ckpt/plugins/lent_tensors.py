"""Did a plugin write into a tensor that it was lent?

torch counts most writes in a version counter, but not those through ``.data``, ``.numpy()`` or a pointer. So bytes are
compared: tensors of the source with a second opening of its files, which no plugin is given, and tensors that a step
of the chain has made with a checksum taken when it returned.

* `SourceTensors.altered` is asked after a chain, before anything is derived from its result.
* What an adapter does after that (``losses``, ``held``, ``size``, ``parts``, ``write``) needs no pass of its own: the
  files that it wrote are read back and compared anyway, not with memory, but with what `SourceTensors.original`
  returns. A write into what is not written to the target changes no file and is not looked for, nor is one into a
  copy that the adapter has made itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

from torch import Tensor

from vraxion_ckpt.checkpoint.comparison import different, in_threads
from vraxion_ckpt.checkpoint.model import Checkpoint, Expert, TensorState, tensor_state, unbound_state_dict
from vraxion_ckpt.checkpoint.plain_data import checksum, named_tensors
from vraxion_ckpt.checkpoint.shared_memory import extent
from vraxion_ckpt.errors import CkptError, CkptWarning, PluginError
from vraxion_ckpt.wording import listed

_SMALL = 2**20  # bytes; of more, a checksum takes longer than to open the file again and compare


class WriteCounts:
    """The states of the tensors of a checkpoint, with torch's version counters, which most writes count up."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._states = [(name, tensor, tensor_state(tensor)) for name, tensor in _outside_experts(checkpoint)]
        self._experts = dict(checkpoint.head.experts) if checkpoint.head else {}

    def risen(self) -> list[str]:
        """Name what has been written into since; experts that were opened meanwhile are looked at, too."""
        written = [name for name, tensor, state in self._states if tensor_state(tensor) != state]
        return written + [f"expert {i}" for i, expert in self._experts.items() if expert.was_written_into]


class MadeTensors:
    """Checksums of the tensors of a checkpoint that steps of a chain have made."""

    def __init__(self, before: Checkpoint) -> None:
        self._before = before
        self._known: dict[int, tuple[str, Tensor, TensorState, int]] = {}
        self.steps = 0  # how many have returned

    def note(self, after: Checkpoint) -> None:
        """Take the checksums of what a step returned, unless they are known or it is from the source."""
        lent = {id(tensor) for _, tensor in tensors_by_name(self._before)}
        made = {id(tensor): (name, tensor) for name, tensor in tensors_by_name(after) if id(tensor) not in lent}
        new = checksums([tensor for key, (_, tensor) in made.items() if key not in self._known])
        self._known = {
            key: (name, tensor, tensor_state(tensor), new[key]) if key in new else self._known[key]
            for key, (name, tensor) in made.items()
        }
        self.steps += 1

    def altered(self) -> list[str]:
        """Name the tensors whose bytes have changed since they were noted."""
        known = self._known.values()
        now = checksums([tensor for _, tensor, _, _ in known])
        return [name for name, t, state, crc in known if (tensor_state(t), now[id(t)]) != (state, crc)]

    def checksum(self, tensor: Tensor) -> int | None:
        """Return the checksum that was taken of a tensor, None if none was."""
        entry = self._known.get(id(tensor))
        return entry[3] if entry else None


class SourceTensors:
    """The tensors of a checkpoint as its files hold them."""

    def __init__(self, before: Checkpoint, reopen: Callable[[], Checkpoint]) -> None:
        """Remember which tensors are lent; called before any plugin is given the checkpoint.

        Args:
            before: the checkpoint.
            reopen: opens it again in the same way.
        """
        self.made = MadeTensors(before)
        self._counts = WriteCounts(before)
        self._before = before
        self._reopen = reopen
        self._lent = list(_outside_experts(before))
        self._places: dict[int, tuple[int, str]] = {}  # of experts' tensors: the expert and the leaf

    def altered(self) -> list[str]:
        """Name the tensors whose bytes are not those of the files; of experts, only open ones are looked at.

        Raises:
            ChangedError: the files have changed.
        """
        return self._altered(self._lent, self._before)

    def original(self, tensor: Tensor) -> tuple[Tensor, int | None]:
        """Return what holds the bytes that a tensor must have, and their checksum if that is known.

        For a tensor of the source, that is the one of the second opening.
        """
        if id(tensor) in self._originals:
            return self._originals[id(tensor)], None
        if id(tensor) not in self._places:
            self._places = {id(t): (i, leaf) for i, expert in _open_experts(self._before) for leaf, t in expert.items()}
        if id(tensor) in self._places and self._fresh.head is not None:
            i, leaf = self._places[id(tensor)]
            return self._fresh.head.experts[i][leaf], None
        return tensor, self.made.checksum(tensor)

    def written(self) -> list[str]:
        """Name the source's tensors that have been changed in a way that torch counts; reads no bytes."""
        return self._counts.risen()

    def altered_in(self, checkpoint: Checkpoint) -> list[str]:
        """Name the tensors of a result that have other bytes than when the chain had returned them."""
        self._before.sources.check_unchanged()
        pairs = [(name, self.original(tensor)[0], tensor) for name, tensor in tensors_by_name(checkpoint)]
        return different(pairs) + self.made.altered()

    def once_more(self) -> tuple[Checkpoint, Callable[[], list[str]]]:
        """Return an opening of its own for another run of the chain, and what names its altered tensors so far."""
        again = self._open_again()
        for i, _ in _open_experts(self._before):
            assert again.head is not None
            _ = again.head.experts[i].tensors
        lent = list(_outside_experts(again))
        return again, lambda: self._altered(lent, again)

    def _altered(self, lent: list[tuple[str, Tensor]], checkpoint: Checkpoint) -> list[str]:
        proven = _proven(checkpoint)
        pairs = [
            (name, self._second(place), tensor) for place, (name, tensor) in enumerate(lent) if id(tensor) not in proven
        ]
        for i, expert in _open_experts(checkpoint):
            for leaf, tensor in expert.items():
                if id(tensor) not in proven:
                    assert self._fresh.head is not None
                    pairs.append((f"expert {i} {leaf}", self._fresh.head.experts[i][leaf], tensor))
        found = different(pairs)
        if found:
            self._before.sources.check_unchanged()
        return found

    def _second(self, place: int) -> Tensor:
        return self._fresh_lent[place][1]

    @cached_property
    def _originals(self) -> dict[int, Tensor]:
        return {id(tensor): self._second(place) for place, (_, tensor) in enumerate(self._lent)}

    @cached_property
    def _fresh(self) -> Checkpoint:
        return self._open_again()

    @cached_property
    def _fresh_lent(self) -> list[tuple[str, Tensor]]:
        fresh = list(_outside_experts(self._fresh))
        if [name for name, _ in fresh] != [name for name, _ in self._lent]:
            self._before.sources.check_unchanged()
            raise PluginError("reads the same files as different checkpoints", key=self._before.origin.format)
        return fresh

    def _open_again(self) -> Checkpoint:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CkptWarning)  # said already
            try:
                return self._reopen()
            except CkptError:
                self._before.sources.check_unchanged()
                raise


def _proven(checkpoint: Checkpoint) -> set[int]:
    """Return the ids of small tensors that have the checksum that their file states; no file is opened for them."""
    parts = checkpoint.sources.parts()
    stated = [
        (tensor, part)
        for _, tensor in tensors_by_name(checkpoint)
        if tensor.is_contiguous() and tensor.numel() * tensor.itemsize <= _SMALL and (part := parts.get(extent(tensor)))
    ]
    found = checksums([tensor for tensor, _ in stated])
    return {id(tensor) for tensor, part in stated if part.note(found[id(tensor)])}


def tensors_by_name(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint that is at hand with its name; opens no expert."""
    yield from _outside_experts(checkpoint)
    for i, expert in _open_experts(checkpoint):
        yield from ((f"expert {i} {leaf}", tensor) for leaf, tensor in expert.items())


def checksums(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Return the CRC-32 of each tensor's elements as they are stored, by the tensor's id."""
    found = in_threads(checksum, [(tensor,) for tensor in tensors])
    return {id(tensor): crc for tensor, crc in zip(tensors, found, strict=True)}


def _outside_experts(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    optimizer, unbound = checkpoint.optimizer, unbound_state_dict(checkpoint)
    yield from checkpoint.core.items()
    if optimizer is not None:
        groups = [group.options for group in optimizer.groups]
        yield from named_tensors({**optimizer.state, "groups": groups, "extra": optimizer.extra}, "optimizer")
    if unbound is not None:
        yield from named_tensors(unbound, "optimizer")
    yield from named_tensors(checkpoint.payload, "payload")


def _open_experts(checkpoint: Checkpoint) -> Iterable[tuple[int, Expert]]:
    experts = checkpoint.head.experts if checkpoint.head else {}
    return [(i, expert) for i, expert in experts.items() if expert.is_open]


def wrote_into(names: Sequence[str]) -> str:
    """Say in words that a plugin wrote into tensors."""
    return f"wrote into a tensor of its input: {listed(names, 3)}"
