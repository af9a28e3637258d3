"""Detect plugins that write into tensors of their input, the lent tensors.

torch counts most writes in a version counter, but not those through ``.data``, ``.numpy()`` or a pointer. Therefore,
bytes are compared. A plugin can only write into memory that it got. Memory that was mapped from a file is compared with
the file. Memory that a plugin made is compared with a checksum, which is taken when the plugin hands it over.

`LentTensors.altered` is called after a chain, before anything is derived from its result, and once more when the result
was read back, which covers the later calls of the adapter. Only tensors that a plugin got are read for this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vraxion_ckpt.checkpoint.comparison import in_threads
from vraxion_ckpt.checkpoint.model import Checkpoint, UnboundCheckpoint
from vraxion_ckpt.checkpoint.plain_data import named_references
from vraxion_ckpt.checkpoint.references import Storage, TensorRef, as_reference, hand_over, was_written
from vraxion_ckpt.wording import listed


class LentTensors:
    """The tensors of a checkpoint, and of the results of a chain, that plugins may have written into."""

    def __init__(self, before: Checkpoint) -> None:
        """Remember the tensors of `before`. Call this before any plugin gets the checkpoint."""
        self._names: dict[int, tuple[str, Storage]] = {}  # by the id of the storage
        self._made: list[int] = []  # ids of the storages that steps made
        self.steps = 0  # number of steps that have returned
        self._note(references_by_name(before))
        for i, expert in before.head.experts.items() if before.head else ():
            expert.open_through(self._noting(f"expert {i}"))

    def note(self, after: Checkpoint) -> None:
        """Remember the tensors that a step returned, with checksums of those that it made."""
        known = len(self._names)
        self._note(references_by_name(after))
        self._made += list(self._names)[known:]
        self.steps += 1

    def altered(self) -> list[str]:
        """Return the names of the tensors whose bytes differ from the file, or have changed since they were noted.

        Raises:
            ChangedError: a file has changed.
        """
        return _altered(self._names.values())

    def altered_made(self) -> list[str]:
        """Return the names of the tensors that earlier steps made and whose bytes have changed since."""
        return _altered(self._names[key] for key in self._made)

    def _note(self, named: Iterable[tuple[str, TensorRef]]) -> None:
        new: list[tuple[Storage]] = []
        for name, ref in named:
            if id(ref.storage) not in self._names:
                self._names[id(ref.storage)] = name, ref.storage
                if ref.storage.given is not None:
                    new.append((ref.storage,))
                    hand_over(ref)
        in_threads(lambda storage: storage.note(), new)

    def _noting(self, name: str) -> Callable[[Callable[[], Mapping[str, Any]]], Mapping[str, Any]]:
        def opened(opener: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
            leaves = {leaf: as_reference(tensor) for leaf, tensor in opener().items()}
            self._note((f"{name} {leaf}", ref) for leaf, ref in leaves.items())
            return leaves

        return opened


def _altered(named: Iterable[tuple[str, Storage]]) -> list[str]:
    got = [(name, storage) for name, storage in named if storage.given is not None]
    wrong = in_threads(lambda storage: storage.was_written_into(), [(storage,) for _, storage in got])
    return [name for (name, _), is_wrong in zip(got, wrong, strict=True) if is_wrong]


def counted_writes(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the tensors into which torch counted a write since a plugin got them. Reads no bytes."""
    return [name for name, ref in references_by_name(checkpoint) if was_written(ref)]


def references_by_name(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorRef]]:
    """Yield each tensor of a checkpoint with its name. Experts that are not open are skipped."""
    yield from checkpoint.core.references().items()
    optimizer = checkpoint.optimizer
    if optimizer is not None:
        groups = [group.options for group in optimizer.groups]
        for value in (optimizer.state, {"groups": groups, "extra": optimizer.extra}):
            yield from named_references(value, "optimizer")
    if isinstance(checkpoint, UnboundCheckpoint):
        yield from named_references(checkpoint.unbound.state_dict, "optimizer")
    yield from named_references(checkpoint.payload, "payload")
    for i, expert in checkpoint.head.experts.items() if checkpoint.head else ():
        if expert.is_open:
            yield from ((f"expert {i} {leaf}", ref) for leaf, ref in expert.references().items())


def wrote_into(names: Sequence[str]) -> str:
    """Return the error message for a plugin that wrote into the named tensors."""
    return f"wrote into a tensor of its input: {listed(names, 3)}"
