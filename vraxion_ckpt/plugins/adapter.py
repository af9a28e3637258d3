"""The base class of adapters: one file format each, read into and written from the canonical checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.errors import CkptError, OutOfMemoryError, PluginError
from vraxion_ckpt.plugins.options import Plugin

_T = TypeVar("_T")


@dataclass(frozen=True)
class Loss:
    """Something that a checkpoint has and a format cannot hold."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint that is a directory.

    Attributes:
        content: equal for two files that hold the same, as far as that can be told without opening any.
        write: writes it to a path where nothing is yet.
        size: returns how many bytes that would be.
    """

    content: object
    write: Callable[[Path], None]
    size: Callable[[], int]


class Faults:
    """What is wrong with a checkpoint, collected instead of raised."""

    def __init__(self) -> None:
        self.errors: list[CkptError] = []

    def attempt(self, step: Callable[[], _T]) -> _T | None:
        """Return what a step returns; note what it raises, once, and return None."""
        try:
            return step()
        except (OutOfMemoryError, PluginError):  # say nothing about the checkpoint
            raise
        except CkptError as error:
            self.note(error)
        return None

    def note(self, error: CkptError) -> None:
        """Note a fault, unless it is known already."""
        if str(error) not in map(str, self.errors):
            self.errors.append(error)


class Adapter(Plugin):
    """Read and write one checkpoint format. Fields are options (``--to NAME:key=value``).

    A format that is a directory may tell its files apart (`pivot`, `parts`, `unseen`, `read_over`): an edit in place
    then writes only those that change. Without, the whole directory is written anew and exchanged.

    Attributes:
        suffixes: endings of a target's name that mean this format; ``/`` means a directory.
        pivot: the file that a loader reads first and that decides which others count, by its path below the directory.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    pivot: ClassVar[str | None] = None

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

    def examine(self, path: Path, faults: Faults) -> Checkpoint | None:
        """Read a checkpoint as far as possible, and note every fault instead of stopping at the first.

        A format of several files looks at each of them by itself here. The checkpoint is returned if it can be read as
        a whole; what concerns its contents, and checksums of what it has mapped, are the caller's.
        """
        return faults.attempt(lambda: self.read(path))

    def dialect(self, checkpoint: Checkpoint) -> str:  # noqa: ARG002 - most formats are spelt in one way only
        """Tell in words how this format is spelt in a checkpoint that was read from it; empty if there is one way."""
        return ""

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

    def size(self, checkpoint: Checkpoint) -> int | None:  # noqa: ARG002 - not every format can tell
        """Return how many bytes `write` would write, or None if only writing tells."""
        return None

    def foreign_files(self, path: Path) -> list[Path]:
        """List what lies in an existing directory `path` and is not part of a checkpoint of this format.

        Asked before a directory is replaced, so that nobody else's files go with it, and when one is edited, where they
        stay. A format that does not say cannot be edited in place if it is a directory.
        """
        return sorted(path.iterdir()) if path.is_dir() else []

    # --- in place: what a format with a `pivot` tells of its files ---

    def parts(self, checkpoint: Checkpoint) -> Mapping[str, Part]:
        """Return every file of the directory by its path below it; opens no expert."""
        raise NotImplementedError

    def unseen(self, name: str, before: Checkpoint, after: Checkpoint, reader: Checkpoint) -> bool:
        """Tell whether it makes no difference which of two states a file is in to whoever has read the pivot.

        Args:
            name: a file other than the pivot, in `parts` of either checkpoint or both.
            before: the checkpoint in the old state.
            after: the checkpoint in the new state.
            reader: the one of the two whose pivot was read.
        """
        raise NotImplementedError

    def read_over(self, path: Path, staged: Path, removed: Collection[str]) -> Checkpoint:
        """Read the directory `path` as it will be with the files below `staged` laid over it, and without `removed`."""
        raise NotImplementedError
