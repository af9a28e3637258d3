"""The base class of transforms, and the chain: a tuple and a ``for``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vraxion_ckpt.companions import CompanionPolicy, follow
from vraxion_ckpt.errors import CkptError, PluginError, StorageError, raise_if_out_of_memory
from vraxion_ckpt.invariants import router_owners
from vraxion_ckpt.model import Checkpoint, Record
from vraxion_ckpt.options import Plugin, resolved
from vraxion_ckpt.placement import place, place_as_listed, refuse_undecided


class Transform(Plugin):
    """Turn a checkpoint into a checkpoint. Fields are options (``NAME:key=value``).

    `apply` gets a copy of its own: it may change any container and must never write into a tensor. It refuses
    with `TransformError`, and neither reads nor changes global random state.
    """

    @abstractmethod
    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the changed checkpoint; it may be the one that was given.

        Raises:
            TransformError: this checkpoint cannot be transformed so, and why.
        """

    def function_noise(self) -> float | None:
        """Return by how much, with these options, the expert tensors behind an address may differ afterwards.

        0: not in a bit; more: by Gaussian noise of this standard deviation; None: it is meant to change the
        function. A chain is held to what its transforms say together.
        """
        return None

    def side_files(self, checkpoint: Checkpoint) -> Mapping[Path, bytes]:  # noqa: ARG002 - most have none
        """Return files to write beside the target, from the checkpoint that `apply` returned."""
        return {}


@dataclass(frozen=True)
class Step:
    """A configured transform and the distribution it comes from."""

    transform: Transform
    distribution: str
    version: str


@dataclass(frozen=True)
class ChainPolicy:
    """What the user says about all that follows when a chain changes the head.

    Attributes:
        companions: what becomes of averages and the like.
        result_order: the names of the result's optimizer in its order; found by rule if not given.
    """

    companions: CompanionPolicy = "grow"
    result_order: Sequence[str] | None = None


FOLLOW = ChainPolicy()


def apply_chain(
    checkpoint: Checkpoint, chain: Iterable[Step], policy: ChainPolicy = FOLLOW
) -> tuple[Checkpoint, dict[Path, bytes]]:
    """Apply transforms from left to right, recording each in the checkpoint's history.

    Returns:
        The last checkpoint and the side files that transforms ask for.

    Raises:
        TransformError: a transform refuses.
        PluginError: a transform fails in another way, or wrote into a tensor it was lent.
    """
    side_files: dict[Path, bytes] = {}
    for step in chain:
        before, versions = checkpoint, _versions(checkpoint)
        name = step.transform.name
        blame = f"this is a defect of {step.distribution}"
        try:
            with torch.no_grad():  # parameters saved as such would otherwise drag a graph along
                after = step.transform.apply(before.copy())
                asked = dict(step.transform.side_files(after))
            options = resolved(step.transform)
        except CkptError:
            raise
        except OSError as error:
            raise StorageError.from_os_error(error, error.filename or name) from error
        except Exception as error:
            raise_if_out_of_memory(error)
            raise PluginError(f"{type(error).__name__}: {error}", key=name, hint=blame) from error
        if not isinstance(after, Checkpoint):
            raise PluginError(f"returned {type(after).__name__}, not a Checkpoint", key=name, hint=blame)
        experts = before.head.experts.values() if before.head else ()
        if any(tensor._version != version for tensor, version in versions) or any(e.was_written_into for e in experts):
            raise PluginError("wrote into a tensor of its input", key=name, hint=blame)
        record = Record(
            name=name,
            options=options,
            distribution=step.distribution,
            version=step.version,
            source=before.origin.path.name if before.origin.path else "",
            summary=_in_one_line(before, after),
        )
        after = _followed(before, after, policy)
        checkpoint = replace(after, history=(*before.history, record), ancestors={})
        side_files.update(asked)
    if policy.result_order is not None:
        checkpoint = place_as_listed(checkpoint, policy.result_order)
    return checkpoint, side_files


def _followed(before: Checkpoint, after: Checkpoint, policy: ChainPolicy) -> Checkpoint:
    """Return a step's result with the optimizer in order, and averages of the model changed as the head was."""
    refuse_undecided(before, after)
    if policy.result_order is None:
        after = place(before, after)
    return follow(before, after, policy.companions)


def _versions(checkpoint: Checkpoint) -> list[tuple[Tensor, int]]:
    """Take the version counters of all tensors outside experts; torch counts a tensor up when it is written into."""
    tensors = list(checkpoint.core.values())
    if checkpoint.optimizer is not None:
        slots = checkpoint.optimizer.state.values()
        tensors += [value for entries in slots for value in entries.values() if isinstance(value, Tensor)]
    return [(tensor, tensor._version) for tensor in tensors]


def _in_one_line(before: Checkpoint, after: Checkpoint) -> str:
    parts = []
    if before.head and after.head and before.head.kind != after.head.kind:
        parts.append(f"{before.head.kind} → {after.head.kind} head")
    parts.append(f"{before.num_experts} → {after.num_experts} experts")
    moved = moved_addresses(before, after)
    if moved:
        parts.append(f"{moved} address{'es' * (moved != 1)} moved")
    replaced = _replaced_experts(before, after)
    if replaced:
        parts.append(f"expert{'s' * (len(replaced) != 1)} {', '.join(map(str, replaced))} replaced")
    if after.plan is not None and after.plan != before.plan:
        note = f" ({after.plan.note})" if after.plan.note else ""
        parts.append(f"plan: expert {after.plan.parent} gives up {len(after.plan.addresses)} addresses{note}")
    return ", ".join(parts)


def _replaced_experts(before: Checkpoint, after: Checkpoint) -> list[int]:
    """List the experts that are other tensors now, where a head was not rebuilt in any other way."""
    if before.head is None or after.head is None or before.head.experts.keys() != after.head.experts.keys():
        return []
    if before.head.kind != after.head.kind or moved_addresses(before, after):
        return []
    return [i for i, expert in after.head.experts.items() if expert is not before.head.experts[i]]


def moved_addresses(before: Checkpoint, after: Checkpoint) -> int:
    """Count the ring addresses that another expert owns now; 0 where the rings cannot be compared.

    An expert that was only renumbered is the same expert.
    """
    if before.router_map is None or after.router_map is None or before.head is None or after.head is None:
        return 0
    old, new = router_owners(before.router_map), router_owners(after.router_map)
    if old.shape != new.shape:
        return 0
    known = {id(expert): i for i, expert in before.head.experts.items()}
    former = np.arange(max(before.num_experts, after.num_experts, 1))
    for i, expert in after.head.experts.items():
        former[i] = known.get(id(expert), i)
    return int(np.count_nonzero(old != former[new]))
