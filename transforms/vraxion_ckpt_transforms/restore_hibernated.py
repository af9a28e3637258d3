"""Put the snapshot of a hibernated expert back: the checkpoint holds zeros where the trainer had moved it out.

VRAXION's trainers write ``expert_<id>.pt`` when an expert is idle: a dict of leaf name → tensor, without a step. A
later hibernation of the same expert overwrites it, so a snapshot may be older or newer than the checkpoint.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from vraxion_ckpt.plugin_api import (
    Checkpoint,
    CkptWarning,
    Effect,
    Expert,
    Head,
    InconsistentError,
    IntList,
    Transform,
    TransformError,
    UsageError,
    check_expert,
    fills_storage,
    has_nonfinite,
    head_of,
    hookimpl,
    is_zero,
    load_torch_file,
    numbered,
    sharing,
    unfit,
)


class RestoreHibernated(Transform):
    """Put snapshots of hibernated experts back in place of their zeros."""

    name: ClassVar[str] = "restore_hibernated"

    snapshots: Path = Field(description="directory that holds expert_<id>.pt, as a trainer's hibernation writes them")
    experts: IntList | None = Field(None, description="experts to restore, like [0,2]; all that are zero if not given")
    replace: bool = Field(False, description="allow replacing an expert whose weights are not all zero")
    allow_nan: bool = Field(False, description="allow snapshots with weights that are NaN or infinite")

    def effect(self) -> Effect:
        return Effect.changed()

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        head = head_of(checkpoint)
        if not self.snapshots.is_dir():
            raise UsageError("no such directory", path=self.snapshots)
        chosen = self._chosen(head)
        restored = {i: self._restored(i, head.experts[i], checkpoint) for i in chosen}
        # Assigned only now: an error for one of them leaves all as they are.
        head.experts = {i: restored.get(i, expert) for i, expert in head.experts.items()}
        self._warn(restored)
        return checkpoint

    def _chosen(self, head: Head) -> list[int]:
        if self.experts is None:
            found = [i for i in sorted(head.experts) if is_zero(head.experts[i])]
            if not found:
                raise TransformError("there is no expert whose weights are all zero")
            return found
        if not self.experts:
            raise TransformError("experts names none", hint="leave it out to restore all that are zero")
        chosen = sorted(set(self.experts))
        for i in chosen:
            check_expert(head, i)
            if not self.replace and not is_zero(head.experts[i]):
                raise TransformError(
                    f"expert {i} is not hibernated: its weights are not all zero",
                    hint="leave it out, or pass replace=true",
                )
        return chosen

    def _restored(self, expert: int, old: Expert, checkpoint: Checkpoint) -> Expert:
        """Read the snapshot of an expert; refuse one that does not fit in the expert's place."""
        path = self._snapshot(expert)
        snapshot = load_torch_file(path, checkpoint.sources)
        if not isinstance(snapshot, dict) or not all(isinstance(value, Tensor) for value in snapshot.values()):
            raise InconsistentError("a snapshot must be a dict of leaf name → tensor", path=path)
        for leaf, what in unfit(snapshot, old, ("the snapshot", f"expert {expert}"), same_widths=True):
            raise TransformError(f"{leaf} {what}" if leaf else what, path=path)
        if is_zero(snapshot):
            raise TransformError(f"the snapshot of expert {expert} is all zero, too", path=path)
        if has_nonfinite(snapshot) and not self.allow_nan:
            message = f"the snapshot of expert {expert} has weights that are NaN or infinite"
            raise TransformError(message, path=path, hint="pass allow_nan=true to restore it")
        return Expert({leaf: _alone(snapshot, leaf, like=tensor) for leaf, tensor in old.items()})

    def _snapshot(self, expert: int) -> Path:
        path = self.snapshots / f"expert_{expert}.pt"
        if not os.path.lexists(path):
            raise TransformError(
                f"there is no snapshot of expert {expert}: no expert_{expert}.pt in {self.snapshots}",
                hint=f"name the experts to restore: experts=[…] without {expert}",
            )
        inside = Path(os.path.realpath(path)).parent == Path(os.path.realpath(self.snapshots))
        if not path.is_file() or not inside:
            raise TransformError("a snapshot must be a regular file in that directory", path=path)
        return path

    def _warn(self, restored: Mapping[int, Expert]) -> None:
        odd = [i for i, expert in restored.items() if has_nonfinite(expert)]
        told = [
            f"the weights of {numbered('expert', restored)} were replaced by "
            f"{'snapshots' if len(restored) > 1 else 'a snapshot'} from {self.snapshots}",
            "A snapshot carries no step and is overwritten by each later hibernation, so it is not known which step it "
            "is of",
            "The optimizer's state is the checkpoint's",
            *([f"In the snapshot of {numbered('expert', odd)}, weights are NaN or infinite"] if odd else []),
        ]
        warnings.warn(". ".join(told), CkptWarning, stacklevel=3)


def _alone(snapshot: Mapping[str, Tensor], leaf: str, like: Tensor) -> Tensor:
    """Return a tensor of the snapshot, of the type of `like`, that has its storage for itself."""
    tensor = snapshot[leaf].detach()
    shares = any(name == leaf for group in sharing(snapshot.items()) for name, _ in group)
    if shares or not fills_storage(tensor):
        tensor = tensor.clone()
    return nn.Parameter(tensor, like.requires_grad) if isinstance(like, nn.Parameter) else tensor


@hookimpl
def register_transforms() -> list[type[Transform]]:
    """Offer the transform."""
    return [RestoreHibernated]
