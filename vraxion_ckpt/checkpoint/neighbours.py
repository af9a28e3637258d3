"""Find out which neighbours of a checkpoint still fit a changed model. See `vraxion_ckpt.checkpoint.provenance`."""

from __future__ import annotations

from dataclasses import dataclass

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.provenance import Neighbour, StaleAfter


@dataclass(frozen=True)
class Neighbours:
    """The neighbours of a source, as far as a result is concerned.

    Attributes:
        carried: those that still fit the result.
        stale: those that do not.
    """

    carried: tuple[Neighbour, ...] = ()
    stale: tuple[Neighbour, ...] = ()


def sort_neighbours(before: Checkpoint, after: Checkpoint) -> Neighbours:
    """Return which neighbours of the checkpoint `before` still fit `after`, and which do not."""
    found = before.origin.neighbours
    if all(neighbour.stale_after is StaleAfter.NOTHING for neighbour in found):
        return Neighbours(found)
    changes = _changes(before, after)
    return Neighbours(
        tuple(neighbour for neighbour in found if neighbour.stale_after not in changes),
        tuple(neighbour for neighbour in found if neighbour.stale_after in changes),
    )


def _changes(before: Checkpoint, after: Checkpoint) -> set[StaleAfter]:
    """Return in which ways the model differs."""
    old, new = before.state_references(), after.state_references()
    if old.keys() != new.keys() or any(
        (tensor.dtype, tensor.shape) != (new[name].dtype, new[name].shape) for name, tensor in old.items()
    ):
        return {StaleAfter.NEW_STRUCTURE, StaleAfter.NEW_VALUES}
    same = list(old) == list(new) and all(
        new[name] is tensor or same_bits(tensor, new[name]) for name, tensor in old.items()
    )
    return set() if same else {StaleAfter.NEW_VALUES}
