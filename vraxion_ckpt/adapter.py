"""The base class of adapters: one file format each, read into and written from the canonical checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vraxion_ckpt.model import Checkpoint
from vraxion_ckpt.options import Plugin


@dataclass(frozen=True)
class Loss:
    """Something that a checkpoint has and a format cannot hold."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


class Adapter(Plugin):
    """Read and write one checkpoint format. Fields are options (``--to NAME:key=value``).

    Attributes:
        suffixes: endings of a target's name that mean this format; ``/`` means a directory.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()

    @property
    def is_directory(self) -> bool:
        """Whether a target of this format, with these options, is a directory."""
        return False

    @classmethod
    @abstractmethod
    def detect(cls, path: Path) -> bool:
        """Tell from its content whether `path` is of this format; must be cheap, and never raise."""

    @abstractmethod
    def read(self, path: Path) -> Checkpoint:
        """Read a checkpoint, mapping tensors where that is possible.

        Every file that is opened is registered in the checkpoint's `sources`. An optimizer whose parameters
        are numbered, not named, is left in `unbound`.

        Raises:
            SourceError: what is wrong with the file, and where.
        """

    def losses(self, checkpoint: Checkpoint) -> list[Loss]:  # noqa: ARG002 - most formats lose nothing
        """List what this format cannot hold of `checkpoint`; asked before anything is written."""
        return []

    def held(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint as this format, with these options, will hold it.

        That is what `write` is given, and what reading the result back must give: without what `losses` lists.
        """
        return checkpoint

    @abstractmethod
    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write to `path`, a staged name: a file that does not exist yet, or an empty directory.

        Flushing to disk, reading back and renaming to the target are the caller's. The same checkpoint gives
        the same bytes.
        """

    def foreign_files(self, path: Path) -> list[Path]:
        """List what lies in an existing directory `path` and is not part of a checkpoint of this format.

        Asked before a directory is replaced, so that nobody else's files go with it.
        """
        return sorted(path.iterdir()) if path.is_dir() else []
