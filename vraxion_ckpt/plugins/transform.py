"""The base class of transforms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.plugins.options import Plugin


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
