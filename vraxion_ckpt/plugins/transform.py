"""The base class of transforms."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.plugins.options import Plugin


@dataclass(frozen=True)
class Effect:
    """What a transform may do to the function that the model computes. Use `exact`, `within_noise` or `changed`.

    Attributes:
        noise: by how much the expert tensors behind each address may differ afterwards: 0 for not at all, otherwise
            the standard deviation of Gaussian noise. None: the function is changed on purpose.
    """

    noise: float | None

    @classmethod
    def exact(cls) -> Effect:
        """The expert tensors behind each address stay bit-identical."""
        return cls(0.0)

    @classmethod
    def within_noise(cls, std: float) -> Effect:
        """The expert tensors differ by Gaussian noise of standard deviation `std`.

        Raises:
            ValueError: `std` is not a finite number ≥ 0.
        """
        if not 0 <= std < math.inf:
            raise ValueError(f"{std} is not a standard deviation")
        return cls(float(std))

    @classmethod
    def changed(cls) -> Effect:
        """The function changes on purpose."""
        return cls(None)


class Transform(Plugin):
    """Turn a checkpoint into a checkpoint. Fields are options (``NAME:key=value``)."""

    @abstractmethod
    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the changed checkpoint, which may be the one that was given.

        The checkpoint is a copy: its containers may be changed. Its tensors are shared and must not be written into.
        Global random state must be neither read nor changed. The optimizer's parameters are always bound to names.

        Raises:
            TransformError: why this checkpoint cannot be transformed.
        """

    @abstractmethod
    def effect(self) -> Effect:
        """Return what this transform, with these options, may do to the function of the model.

        The result of a chain is compared with what its transforms say together.
        """

    def side_files(self, checkpoint: Checkpoint) -> Mapping[Path, bytes]:  # noqa: ARG002 - most have none
        """Return files to write beside the target, from the checkpoint that `apply` returned."""
        return {}


@dataclass(frozen=True)
class Step:
    """A configured transform and the distribution it comes from."""

    transform: Transform
    distribution: str
    version: str
