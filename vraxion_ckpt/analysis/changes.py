"""The result of `diff`: the data model, and its summary in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from vraxion_ckpt.analysis.measurement import Measure
from vraxion_ckpt.support.json_models import Fact, Facts, Plain
from vraxion_ckpt.wording import count

_MOST_LINES = 12

What = Literal["changed", "renamed", "added", "removed"]


class Change(Fact):
    """One entry that differs between the checkpoints."""

    what: What
    """``renamed``: bit-identical under another name."""
    before: str | None
    """Its name in the first checkpoint."""
    after: str | None
    """Its name in the second."""
    old: Plain
    """Its value in the first checkpoint; dtype and shape of a tensor."""
    new: Plain
    """Its value in the second."""
    measure: Measure | None = None
    """The size of the difference, if only the values of a tensor differ."""


class ExpertChange(Fact):
    """An expert that differs between the checkpoints, or has another name."""

    what: What
    before: int | None
    """Its id in the first checkpoint."""
    after: int | None
    """Its id in the second."""
    equal_to: int | None = None
    """For an added expert, the id of a bit-identical expert in the first checkpoint; for a removed one, in the
    second."""
    took_from: int | None = None
    """For an added expert, the previous owner of most of its addresses."""
    measure: Measure | None = None
    """The size of the difference: for a changed expert from its previous tensors, for an added one from the expert in
    `took_from`."""


class Flow(Fact):
    """The number of addresses that moved from one expert to another."""

    before: int
    after: int
    addresses: int


class ArcChange(Fact):
    """An arc of the ring that moved from one expert to another. It may wrap around."""

    start: int
    length: int
    before: int
    after: int


class RingChange(Fact):
    """The addresses with another owner. A renumbered expert counts as the same owner."""

    length: int
    moved: int
    flows: tuple[Flow, ...]
    arcs: tuple[ArcChange, ...]
    """The first 4,096 arcs."""
    arcs_in_all: int


class Side(Fact):
    """One of the two checkpoints."""

    path: Path
    format: str
    num_experts: int
    step: Plain


class Difference(Facts):
    """The difference between two checkpoints."""

    kind_of_facts: ClassVar[str] = "diff"

    before: Side
    after: Side
    identical: bool
    """Whether nothing differs. Floats are compared by their bits; formats may differ."""
    tensors_identical: int
    """Number of bit-identical model tensors with the same name."""
    slots_identical: int
    """Number of bit-identical optimizer slots of the same parameter."""
    bytes_compared: int
    """Bytes of the second checkpoint's model tensors and slots."""
    model: tuple[Change, ...]
    experts: tuple[ExpertChange, ...]
    ring: RingChange | None
    """Null if the rings cannot be compared, or no owner changed."""
    optimizer: tuple[Change, ...]
    """Slots, named ``parameter.slot``; options of param groups; and the trained parameters."""
    not_bound: str | None
    """Why an optimizer is not bound to parameter names. In this case slots are compared by position."""
    payload: tuple[Change, ...]
    lifecycle: tuple[Change, ...]
    history: tuple[Change, ...]
    other: tuple[Change, ...]
    """The planned split, module versions, the order of entries, and files beside the weights."""
    notes: tuple[str, ...] = ()
    """What was not compared, because the files of one checkpoint do not state it."""

    def summary(self) -> list[tuple[str, str]]:
        """Return lines for people: a label and a text for each section with differences."""
        if self.identical:
            size = f"{count(self.tensors_identical, 'tensor')} and {count(self.slots_identical, 'optimizer slot')}"
            return [("identical", f"{size}, bit by bit; ring, payload, lifecycle rows and history too")]
        lines = [("tensors", f"{self.tensors_identical} identical{_counts(self.model)}")]
        lines += [("expert", _in_words(change)) for change in self.experts[:_MOST_LINES]]
        if len(self.experts) > _MOST_LINES:
            lines.append(("expert", f"… {len(self.experts) - _MOST_LINES} more"))
        former = {change.after: change.before for change in self.experts if change.what == "renamed"}
        for flow in self.ring.flows[:_MOST_LINES] if self.ring else ():
            renumbered = former.get(flow.after, flow.after) != flow.after
            number = count(flow.addresses, "address")
            was = f", which was {former[flow.after]}" if renumbered else ""
            lines.append(("ring", f"{number}: expert {flow.before} → expert {flow.after}{was}"))
        if self.ring and len(self.ring.flows) > _MOST_LINES:
            lines.append(("ring", f"… {len(self.ring.flows) - _MOST_LINES} more"))
        if self.slots_identical or self.optimizer:
            lines.append(("optimizer", f"{count(self.slots_identical, 'slot')} identical{_counts(self.optimizer)}"))
        for label in ("payload", "lifecycle", "history", "other"):
            changes = getattr(self, label)
            if changes:
                lines.append((label, _counts(changes).removeprefix(", ")))
        return lines


def _counts(changes: Sequence[Change]) -> str:
    counts = Counter(change.what for change in changes)
    return "".join(f", {n} {what}" for what, n in sorted(counts.items()))


def _in_words(change: ExpertChange) -> str:
    if change.what == "renamed":
        renumbered = change.before != change.after
        return (
            f"{change.before} is now {change.after}" if renumbered else f"{change.after} the same, under another name"
        )
    if change.what == "changed":
        return f"{change.after} changed: {change.measure or 'of other shapes'}"
    if change.what == "removed":
        return f"{change.before} removed" + (
            f", equal to expert {change.equal_to}" if change.equal_to is not None else ""
        )
    if change.equal_to is not None:
        return f"{change.after} new, equal to expert {change.equal_to}"
    if change.took_from is None or change.measure is None:
        return f"{change.after} new"
    return f"{change.after} new, compared with expert {change.took_from}: {change.measure}"
