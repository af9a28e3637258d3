"""What a conversion did, for people and scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.invariants import Preservation
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.provenance import Record
from vraxion_ckpt.conversion.chain import moved_addresses
from vraxion_ckpt.conversion.targets import SideTarget
from vraxion_ckpt.plugins.adapter import Loss
from vraxion_ckpt.support.json_models import Fact, Facts
from vraxion_ckpt.wording import count


class TensorCount(Fact):
    """What became of the model's tensors."""

    copied: int = 0
    renamed: int = 0
    """Bit-identical under another name."""
    created: int = 0
    changed: int = 0
    dropped: int = 0


class Summary(Facts):
    """What a conversion did, or with `dry_run` would do."""

    kind_of_facts: ClassVar[str] = "convert"

    source: Path
    target: Path
    source_format: str
    target_format: str
    experts_before: int
    experts_after: int
    addresses_moved: int
    """How many ring addresses have another owner now."""
    tensors: TensorCount
    optimizer: str
    """Whether the optimizer's state was carried, and if not, why."""
    function_preserved: Preservation | None
    """Whether the expert tensors behind each address are the same; null where there is no ring to compare."""
    losses: tuple[Loss, ...]
    """What the target's format cannot hold."""
    history: tuple[Record, ...]
    """The steps of this run."""
    side_files: tuple[Path, ...]
    """What transforms asked to have written beside the target."""
    manifest: Path | None
    """Where the digests of its files are."""
    bytes_written: int
    """0 for a dry run of a conversion."""
    seconds: float
    dry_run: bool


@dataclass(frozen=True)
class Outcome:
    """What a chain has made of a checkpoint, before anything is written.

    Attributes:
        after: what the chain returned.
        held: what the target's format makes of that.
        side_files: what else is to be written.
        side_targets: where that goes.
        preservation: whether the function is the same.
        losses: what the format cannot hold.
    """

    before: Checkpoint
    after: Checkpoint
    held: Checkpoint
    side_files: dict[Path, bytes]
    side_targets: tuple[SideTarget, ...]
    preservation: Preservation | None
    losses: tuple[Loss, ...]

    def facts(self, *, dropped: bool) -> dict[str, Any]:
        """Return what every `Summary` tells of it; `dropped` if the caller asked to leave the optimizer behind."""
        return {
            "source_format": self.before.origin.format,
            "experts_before": self.before.num_experts,
            "experts_after": self.after.num_experts,
            "addresses_moved": moved_addresses(self.before, self.after),
            "optimizer": optimizer_in_words(self.before, self.after, self.held, dropped=dropped),
            "function_preserved": self.preservation,
            "losses": self.losses,
            "history": self.after.history[len(self.before.history) :],
            "side_files": tuple(self.side_files),
        }


def count_tensors(before: Checkpoint, after: Checkpoint) -> TensorCount:
    """Tell what became of each of the model's tensors."""
    old, new = before.state_dict(), after.state_dict()
    known = {id(tensor) for tensor in old.values()}
    counts: dict[str, int] = dict.fromkeys(("copied", "renamed", "created", "changed", "dropped"), 0)
    accounted: set[int] = set()  # of the old tensors
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
    """Tell whether the optimizer was carried, and if not, why; `dropped` if the caller asked for that.

    `held` is what the target's format makes of `after`.
    """
    if after.optimizer is not None and held.optimizer is None:
        return "left behind: the target does not hold it"
    if after.optimizer is not None:
        number = len(after.optimizer.params)
        placed = ""
        rules = after.optimizer.rules
        if rules is not None and before.optimizer is not None and after.optimizer.params != before.optimizer.params:
            placed = f", placed in the order '{rules[0]}'" if rules else ", placed as listed by --result-order"
        return f"carried: {count(number, 'parameter')}, bound by {after.optimizer.bound_by}{placed}"
    if dropped:
        return "dropped, as asked; build a new one when you resume"
    return "dropped by the chain" if before.optimizer is not None else "none in the source"
