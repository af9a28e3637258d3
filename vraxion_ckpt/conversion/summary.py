"""The summary of a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.invariants import Preservation
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.neighbours import Neighbours
from vraxion_ckpt.checkpoint.provenance import Record
from vraxion_ckpt.conversion.chain import moved_addresses
from vraxion_ckpt.conversion.targets import SideTarget
from vraxion_ckpt.plugins.adapter import Loss
from vraxion_ckpt.support.json_models import Fact, Facts
from vraxion_ckpt.wording import count


class TensorCount(Fact):
    """How many of the model's tensors were copied, renamed, created, changed and dropped."""

    copied: int = 0
    renamed: int = 0
    """Bit-identical under another name."""
    created: int = 0
    changed: int = 0
    dropped: int = 0


class Summary(Facts):
    """The result of a conversion, or the expected result if `dry_run`."""

    kind_of_facts: ClassVar[str] = "convert"

    source: Path
    target: Path
    source_format: str
    target_format: str
    experts_before: int
    experts_after: int
    addresses_moved: int
    """Number of ring addresses whose owner changed."""
    tensors: TensorCount
    optimizer: str
    """Whether the optimizer state was kept, and if not, why."""
    function_preserved: Preservation | None
    """Whether the expert tensors behind each address are unchanged; null if there is no ring to compare."""
    losses: tuple[Loss, ...]
    """The parts that the target's format cannot hold, and entries of the payload that were dropped as asked."""
    carried: tuple[str, ...]
    """The files beside the weights that were carried along unchanged, by path relative to the target."""
    left_out: tuple[str, ...]
    """The files beside the weights that no longer fit the model, and were left out."""
    history: tuple[Record, ...]
    """The steps of this run."""
    side_files: tuple[Path, ...]
    """Additional files that transforms wrote."""
    manifest: Path | None
    """The file with the digests of the written files."""
    bytes_written: int
    """0 for a dry run of `convert`."""
    seconds: float
    dry_run: bool


@dataclass(frozen=True)
class Outcome:
    """The result of a chain for one target, before anything is written.

    Attributes:
        before: the source.
        after: the result of the chain.
        held: `after` without the parts that the target's format cannot hold.
        side_files: additional files to write, with their content.
        side_targets: the final path of each side file.
        preservation: whether the function of the model is unchanged.
        losses: the parts that the format cannot hold, and those that the caller has dropped.
        neighbours: the neighbours to carry along, and those to leave out.
    """

    before: Checkpoint
    after: Checkpoint
    held: Checkpoint
    side_files: dict[Path, bytes]
    side_targets: tuple[SideTarget, ...]
    preservation: Preservation | None
    losses: tuple[Loss, ...]
    neighbours: Neighbours

    def facts(self, *, dropped: bool) -> dict[str, Any]:
        """Return the fields of `Summary` that this outcome determines; `dropped`: the caller dropped the optimizer."""
        return {
            "source_format": self.before.origin.format,
            "experts_before": self.before.num_experts,
            "experts_after": self.after.num_experts,
            "addresses_moved": moved_addresses(self.before, self.after),
            "optimizer": optimizer_in_words(self.before, self.after, self.held, dropped=dropped),
            "function_preserved": self.preservation,
            "losses": self.losses,
            "carried": tuple(neighbour.name for neighbour in self.neighbours.carried),
            "left_out": tuple(neighbour.name for neighbour in self.neighbours.stale),
            "history": self.after.history[len(self.before.history) :],
            "side_files": tuple(self.side_files),
        }


def count_tensors(before: Checkpoint, after: Checkpoint) -> TensorCount:
    """Count which of the model's tensors were copied, renamed, created, changed and dropped."""
    old, new = before.state_references(), after.state_references()
    known = {id(tensor) for tensor in old.values()}
    counts: dict[str, int] = dict.fromkeys(("copied", "renamed", "created", "changed", "dropped"), 0)
    accounted: set[int] = set()  # ids of old tensors that were found in `after`
    for name, tensor in new.items():
        if id(tensor) in known:
            counts["copied" if old.get(name) is tensor else "renamed"] += 1
            accounted.add(id(tensor))
        elif name in old:
            counts["copied" if same_bits(old[name], tensor) else "changed"] += 1
            accounted.add(id(old[name]))
        else:
            counts["created"] += 1
    counts["dropped"] = sum(id(tensor) not in accounted for tensor in old.values())
    return TensorCount(**counts)


def optimizer_in_words(before: Checkpoint, after: Checkpoint, held: Checkpoint, *, dropped: bool) -> str:
    """Describe whether the optimizer state was kept, and if not, why.

    Args:
        before: the source.
        after: the result of the chain.
        held: `after` without the parts that the target's format cannot hold.
        dropped: whether the caller asked to drop the optimizer.
    """
    if after.optimizer is not None and held.optimizer is None:
        return "dropped: the target's format cannot hold it"
    if after.optimizer is not None:
        number = len(after.optimizer.params)
        placed = ""
        if before.optimizer is not None and after.optimizer.params != before.optimizer.params:
            rules = [part.rules for part in after.optimizer.parts if part.rules is not None and not part.is_by_name]
            orders = dict.fromkeys(
                f"in the order '{each[0]}'" if each else "as listed by --result-order" for each in rules
            )
            placed = f", placed {' and '.join(orders)}" if orders else ""
        return f"carried: {count(number, 'parameter')}, bound by {after.optimizer.bound_by}{placed}"
    if dropped:
        return "dropped, as asked; build a new one when you resume"
    return "dropped by the chain" if before.optimizer is not None else "none in the source"
