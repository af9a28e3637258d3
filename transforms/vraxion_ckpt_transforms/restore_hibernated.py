"""Restore hibernated experts, which the checkpoint holds as zeros, from the trainer's snapshots.

When an expert is idle, VRAXION's trainers write ``expert_<id>.pt``: a dict of leaf name → tensor, without a step. The
next hibernation of the same expert overwrites it, so a snapshot may be older or newer than the checkpoint.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

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

if TYPE_CHECKING:
    from torch import Tensor


class RestoreHibernated(Transform):
    """Replace hibernated experts, whose weights are all zero, with their snapshots."""

    name: ClassVar[str] = "restore_hibernated"

    snapshots: Path = Field(description="directory with the files expert_<id>.pt that the trainer has written")
    experts: IntList | None = Field(None, description="experts to restore, like [0,2]; by default all that are zero")
    replace: bool = Field(False, description="allow replacing experts whose weights are not all zero")
    allow_nan: bool = Field(False, description="allow snapshots with weights that are NaN or infinite")

    def effect(self) -> Effect:
        return Effect.changed()

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        head = head_of(checkpoint)
        if not self.snapshots.is_dir():
            raise UsageError("no such directory", path=self.snapshots)
        chosen = self._chosen(head)
        restored = {i: self._restored(i, head.experts[i], checkpoint) for i in chosen}
        # The experts are replaced after all snapshots are read, so that an error changes nothing.
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
            raise TransformError(
                "the list of experts is empty", hint="leave it out to restore all whose weights are zero"
            )
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
        """Return an expert with the tensors of its snapshot. Names, shapes and dtypes must be those of `old`."""
        from torch import Tensor

        path = self._snapshot(expert)
        snapshot = load_torch_file(path, checkpoint.sources)
        if not isinstance(snapshot, dict) or not all(isinstance(value, Tensor) for value in snapshot.values()):
            raise InconsistentError("a snapshot must be a dict of leaf name → tensor", path=path)
        for leaf, what in unfit(snapshot, old, ("the snapshot", f"expert {expert}"), same_widths=True):
            raise TransformError(f"{leaf} {what}" if leaf else what, path=path)
        if is_zero(snapshot):
            raise TransformError(f"the snapshot of expert {expert} is also all zero", path=path)
        if has_nonfinite(snapshot) and not self.allow_nan:
            message = f"the snapshot of expert {expert} has weights that are NaN or infinite"
            raise TransformError(message, path=path, hint="pass allow_nan=true to restore it")
        return Expert({leaf: _unshared(snapshot, leaf, like=tensor) for leaf, tensor in old.items()})

    def _snapshot(self, expert: int) -> Path:
        path = self.snapshots / f"expert_{expert}.pt"
        if not os.path.lexists(path):
            raise TransformError(
                f"there is no snapshot of expert {expert}: no expert_{expert}.pt in {self.snapshots}",
                hint=f"name the experts to restore: experts=[…] without {expert}",
            )
        inside = Path(os.path.realpath(path)).parent == Path(os.path.realpath(self.snapshots))
        if not path.is_file() or not inside:
            raise TransformError("a snapshot must be a regular file in the given directory", path=path)
        return path

    def _warn(self, restored: Mapping[int, Expert]) -> None:
        odd = [i for i, expert in restored.items() if has_nonfinite(expert)]
        sentences = [
            f"the weights of {numbered('expert', restored)} were replaced by "
            f"{'snapshots' if len(restored) > 1 else 'a snapshot'} from {self.snapshots}",
            "Snapshots do not record their step, so they may be older or newer than the checkpoint",
            "The optimizer's state was not changed",
            *([f"Snapshots with weights that are NaN or infinite: {numbered('expert', odd)}"] if odd else []),
        ]
        warnings.warn(". ".join(sentences), CkptWarning, stacklevel=3)


def _unshared(snapshot: Mapping[str, Tensor], leaf: str, like: Tensor) -> Tensor:
    """Return a tensor of the snapshot with a storage of its own, as a parameter if `like` is one."""
    from torch import nn

    tensor = snapshot[leaf].detach()
    shares = any(name == leaf for group in sharing(snapshot.items()) for name, _ in group)
    if shares or not fills_storage(tensor):
        tensor = tensor.clone()
    return nn.Parameter(tensor, like.requires_grad) if isinstance(like, nn.Parameter) else tensor


@hookimpl
def register_transforms() -> list[type[Transform]]:
    """Register the transform."""
    return [RestoreHibernated]
