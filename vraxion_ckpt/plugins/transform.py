"""The base class of transforms."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.plugins.options import Plugin


@dataclass(frozen=True)
class Effect:
    """What a transform may do to the function that the model computes. Use `exact`, `within_noise` or `changed`.

    With `exact` and `within_noise`, tensors outside the head must stay bit-identical; a new tensor is allowed.

    Attributes:
        noise: standard deviation of the Gaussian noise that may be added to the tensors of the expert that owns an
            address; 0 if the tensors stay bit-identical, None if the function changes on purpose.
    """

    noise: float | None

    @classmethod
    def exact(cls) -> Effect:
        """Declare that each address is still served by bit-identical expert tensors."""
        return cls(0.0)

    @classmethod
    def within_noise(cls, std: float) -> Effect:
        """Declare that Gaussian noise of standard deviation `std` may be added to expert tensors.

        Raises:
            ValueError: `std` is not a finite number ≥ 0.
        """
        if not 0 <= std < math.inf:
            raise ValueError(f"{std} is not a standard deviation")
        return cls(float(std))

    @classmethod
    def changed(cls) -> Effect:
        """Declare that the function changes on purpose."""
        return cls(None)


class Transform(Plugin):
    """Change a checkpoint. Fields are options (``NAME:key=value``)."""

    model_config = ConfigDict(defer_build=True)  # most commands load every transform and use none

    @abstractmethod
    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the changed checkpoint, which may be `checkpoint` itself.

        `checkpoint` is a shallow copy: its containers may be changed, but its tensors are shared and must not be
        written into. The global random state must be neither used nor changed. The optimizer's parameters are always
        bound to names.

        Raises:
            TransformError: this checkpoint cannot be transformed.
        """

    @abstractmethod
    def effect(self) -> Effect:
        """Return the declared effect of this transform, with these options, on the function of the model.

        The result of a chain is checked against the combined effects of its transforms.
        """

    def side_files(self, checkpoint: Checkpoint) -> Mapping[Path, bytes]:  # noqa: ARG002 - most have none
        """Return the content, by path, of additional files to write with the target.

        `checkpoint` is the checkpoint that `apply` returned.
        """
        return {}


@dataclass(frozen=True)
class Step:
    """A configured transform and the distribution it comes from."""

    transform: Transform
    distribution: str
    version: str
