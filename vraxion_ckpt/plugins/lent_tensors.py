"""Detect plugins that write into tensors of their input, the lent tensors.

torch counts most writes in a version counter, but not those through ``.data``, ``.numpy()`` or a pointer. Therefore,
bytes are compared. Tensors of the source are compared with those of a second opening of its files, which no plugin
gets. Tensors that a step of the chain created are compared with a checksum taken when the step returned.

* `SourceTensors.altered` is called after a chain, before anything is derived from its result.
* The later calls of the adapter (``losses``, ``held``, ``size``, ``output_files``, ``write``) need no check of their
  own, because the written files are read back and compared with the tensors that `SourceTensors.original` returns. A
  write into a tensor that is not written to the target, or into a copy made by the adapter, is not detected; it changes
  no file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

from torch import Tensor

from vraxion_ckpt.checkpoint.comparison import different, in_threads
from vraxion_ckpt.checkpoint.head import Expert, TensorState, tensor_state
from vraxion_ckpt.checkpoint.model import Checkpoint, unbound_state_dict
from vraxion_ckpt.checkpoint.plain_data import checksum, named_tensors
from vraxion_ckpt.checkpoint.shared_memory import extent
from vraxion_ckpt.errors import CkptError, CkptWarning, PluginError
from vraxion_ckpt.wording import listed

_SMALL = 2**20  # bytes; for larger tensors, opening the file again and comparing is faster than a checksum


class WriteCounts:
    """The states of a checkpoint's tensors, including torch's version counters, which most writes increment."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._states = [(name, tensor, tensor_state(tensor)) for name, tensor in _outside_experts(checkpoint)]
        self._experts = dict(checkpoint.head.experts) if checkpoint.head else {}

    def risen(self) -> list[str]:
        """Return the names of the tensors written into since `__init__`, and of experts written into since opened."""
        written = [name for name, tensor, state in self._states if tensor_state(tensor) != state]
        return written + [f"expert {i}" for i, expert in self._experts.items() if expert.was_written_into]


class MadeTensors:
    """Checksums of the tensors that the steps of a chain created."""

    def __init__(self, before: Checkpoint) -> None:
        self._before = before
        self._known: dict[int, tuple[str, Tensor, TensorState, int]] = {}
        self.steps = 0  # number of steps that have returned

    def note(self, after: Checkpoint) -> None:
        """Compute the checksums of the tensors that a step returned, unless they are known or of the source."""
        lent = {id(tensor) for _, tensor in tensors_by_name(self._before)}
        made = {id(tensor): (name, tensor) for name, tensor in tensors_by_name(after) if id(tensor) not in lent}
        new = checksums([tensor for key, (_, tensor) in made.items() if key not in self._known])
        self._known = {
            key: (name, tensor, tensor_state(tensor), new[key]) if key in new else self._known[key]
            for key, (name, tensor) in made.items()
        }
        self.steps += 1

    def altered(self) -> list[str]:
        """Return the names of the tensors whose bytes have changed since they were noted."""
        known = self._known.values()
        now = checksums([tensor for _, tensor, _, _ in known])
        return [name for name, t, state, crc in known if (tensor_state(t), now[id(t)]) != (state, crc)]

    def checksum(self, tensor: Tensor) -> int | None:
        """Return the noted checksum of a tensor, or None."""
        entry = self._known.get(id(tensor))
        return entry[3] if entry else None


class SourceTensors:
    """The tensors of a checkpoint as they are in its files."""

    def __init__(self, before: Checkpoint, reopen: Callable[[], Checkpoint]) -> None:
        """Remember the tensors of `before`. Call this before any plugin gets the checkpoint.

        Args:
            before: the checkpoint that was read from the files.
            reopen: a function that opens the checkpoint again in the same way.
        """
        self.made = MadeTensors(before)
        self._counts = WriteCounts(before)
        self._before = before
        self._reopen = reopen
        self._lent = list(_outside_experts(before))
        self._places: dict[int, tuple[int, str]] = {}  # tensor id → expert id and leaf name

    def altered(self) -> list[str]:
        """Return the names of the tensors that differ from the files. Experts that are not open are skipped.

        Raises:
            ChangedError: the files have changed.
        """
        return self._altered(self._lent, self._before)

    def original(self, tensor: Tensor) -> tuple[Tensor, int | None]:
        """Return a tensor with the bytes that `tensor` must have, and their CRC-32 if known.

        For a tensor of the source, this is the tensor of the second opening.
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
        """Return the names of source tensors into which torch counted a write. No bytes are read."""
        return self._counts.risen()

    def altered_in(self, checkpoint: Checkpoint) -> list[str]:
        """Return the names of the result's tensors whose bytes have changed since the chain returned."""
        self._before.sources.check_unchanged()
        pairs = [(name, self.original(tensor)[0], tensor) for name, tensor in tensors_by_name(checkpoint)]
        return different(pairs) + self.made.altered()

    def once_more(self) -> tuple[Checkpoint, Callable[[], list[str]]]:
        """Open the checkpoint again for a second run of the chain.

        Returns:
            The checkpoint, and a function that returns the names of its tensors that were altered so far.
        """
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
            raise PluginError("gave other tensor names when it read the files again", key=self._before.origin.format)
        return fresh

    def _open_again(self) -> Checkpoint:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CkptWarning)  # the first opening warned already
            try:
                return self._reopen()
            except CkptError:
                self._before.sources.check_unchanged()
                raise


def _proven(checkpoint: Checkpoint) -> set[int]:
    """Return the ids of small tensors that match the checksum stated in their file. No file is opened."""
    parts = checkpoint.sources.parts()
    stated = [
        (tensor, part)
        for _, tensor in tensors_by_name(checkpoint)
        if tensor.is_contiguous() and tensor.numel() * tensor.itemsize <= _SMALL and (part := parts.get(extent(tensor)))
    ]
    found = checksums([tensor for tensor, _ in stated])
    return {id(tensor) for tensor, part in stated if part.note(found[id(tensor)])}


def tensors_by_name(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a checkpoint with its name. Experts that are not open are skipped."""
    yield from _outside_experts(checkpoint)
    for i, expert in _open_experts(checkpoint):
        yield from ((f"expert {i} {leaf}", tensor) for leaf, tensor in expert.items())


def checksums(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Return the CRC-32 of each tensor's bytes, by the tensor's `id`."""
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
    """Return the error message for a plugin that wrote into the named tensors."""
    return f"wrote into a tensor of its input: {listed(names, 3)}"
