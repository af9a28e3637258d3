"""The base classes of adapters. An adapter reads and writes one file format."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.provenance import Neighbour
from vraxion_ckpt.errors import CkptError, OutOfMemoryError, PluginError
from vraxion_ckpt.plugins.options import Plugin
from vraxion_ckpt.plugins.read_context import ReadContext

_T = TypeVar("_T")


@dataclass(frozen=True)
class Loss:
    """A part of a checkpoint that a format cannot hold.

    Attributes:
        what: the part, such as ``optimizer state``.
        why: the reason that the format cannot hold it.
    """

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file that an `IncrementalDirectoryAdapter` would write.

    Attributes:
        content: a value that is equal for two files with the same content. Files are compared by it, without opening
            them.
        write: a function that writes the file to a path that does not exist yet.
        size: a function that returns the size of the file in bytes.
    """

    content: object
    write: Callable[[Path], None]
    size: Callable[[], int]


class Faults:
    """Collect the errors of a checkpoint instead of raising the first."""

    def __init__(self) -> None:
        self.errors: list[CkptError] = []

    def attempt(self, step: Callable[[], _T]) -> _T | None:
        """Call `step` and return its result. If it raises an error about the checkpoint, note it and return None.

        Raises:
            OutOfMemoryError, PluginError: raised by `step`; they do not describe the checkpoint.
        """
        try:
            return step()
        except (OutOfMemoryError, PluginError):
            raise
        except CkptError as error:
            self.note(error)
        return None

    def note(self, error: CkptError) -> None:
        """Add an error, unless one with the same text was noted before."""
        if str(error) not in map(str, self.errors):
            self.errors.append(error)


class Adapter(Plugin):
    """Read and write one checkpoint format. Fields are options (``--to NAME:key=value``).

    An edit in place of a directory format writes a new directory and exchanges it with the old one. To write only the
    files that change, subclass `IncrementalDirectoryAdapter`.

    Attributes:
        suffixes: endings of a target's name that select this format; ``/`` selects it for a directory.
        loads_pickles: whether files of this format are pickles. Only then may ``allow_globals`` be given.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    loads_pickles: ClassVar[bool] = False

    @property
    def is_directory(self) -> bool:
        """Whether a target of this format, with these options, is a directory."""
        return False

    @property
    def keeps_neighbours(self) -> bool:
        """Whether a target of this format, with these options, is a folder that may have neighbours.

        If so, a conversion copies the neighbours of its source into the target.
        """
        return False

    @classmethod
    @abstractmethod
    def detect(cls, path: Path) -> bool:
        """Return whether `path` has this format, judged by its content.

        Detection calls this method of every adapter, so it must be cheap and must not raise.
        """

    @abstractmethod
    def read(self, path: Path, context: ReadContext) -> Checkpoint:
        """Read a checkpoint. Map tensors instead of reading them where the format allows it.

        Args:
            path: a file or a directory.
            context: opens files and registers them. The registered files become the checkpoint's `sources`.

        Returns:
            The checkpoint, or an `UnboundCheckpoint` if the file numbers the optimizer's parameters instead of naming
            them.

        Raises:
            SourceError: the file is damaged, unsafe or not supported.
        """

    def examine(self, path: Path, faults: Faults, context: ReadContext) -> Checkpoint | None:
        """Read as much of a checkpoint as possible, and note every error instead of raising the first.

        An adapter of a format with several files should examine each file here. The caller checks the contents of the
        returned checkpoint and the checksums of the registered files.

        Returns:
            The checkpoint, or None if it cannot be read as a whole.
        """
        return faults.attempt(lambda: self.read(path, context))

    def dialect(self, checkpoint: Checkpoint) -> str:  # noqa: ARG002 - most formats have one dialect
        """Describe the variant of this format that a checkpoint was read from; empty if there is only one."""
        return ""

    def losses(self, checkpoint: Checkpoint) -> list[Loss]:  # noqa: ARG002 - most formats lose nothing
        """List the parts of `checkpoint` that this format cannot hold. Called before anything is written."""
        return []

    def held(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint without the parts that `losses` lists.

        The result is passed to `write`. Reading the written file back must return an equal checkpoint.
        """
        return checkpoint

    @abstractmethod
    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write to `path`, a staging path: a file that does not exist yet, or an empty directory.

        The caller flushes the result to disk, reads it back and renames it to the target. Equal checkpoints must give
        identical bytes.
        """

    def size(self, checkpoint: Checkpoint) -> int | None:  # noqa: ARG002 - not every format can tell
        """Return how many bytes `write` would write, or None if this is not known before writing."""
        return None

    def neighbours(self, path: Path) -> list[Neighbour]:  # noqa: ARG002 - most formats have none
        """List the files of the directory `path` that belong to the checkpoint and that this format does not read.

        They are carried along with the checkpoint: an edit keeps them, and a conversion copies them or reports a loss.
        """
        return []

    def as_stored(self, path: Path) -> Adapter:  # noqa: ARG002 - most formats are always stored alike
        """Return this adapter with the options that write a checkpoint as the one at `path` is stored.

        An edit uses it if the user gives no options for writing.
        """
        return self

    def foreign_files(self, path: Path) -> list[Path] | None:  # noqa: ARG002 - not every format can tell
        """List the entries of the directory `path` that are neither part of a checkpoint of this format nor neighbours.

        An edit keeps them. A conversion does not copy them, and refuses to replace a directory that has any.

        Returns:
            The paths, or None if the format cannot distinguish them. In this case, a directory cannot be edited in
            place, and is replaced only if it is empty.
        """
        return None


class IncrementalDirectoryAdapter(Adapter):
    """Read and write a directory format file by file, so that an edit in place writes only the files that change.

    Attributes:
        index_file: path, relative to the directory, of the file that a reader opens first. It determines which other
            files the reader opens. An edit takes effect when this file is replaced.
    """

    index_file: ClassVar[str]

    @property
    def is_directory(self) -> bool:
        return True

    @abstractmethod
    def output_files(self, checkpoint: Checkpoint) -> Mapping[str, OutputFile]:
        """Return every file of the directory by its relative path. Must not open an expert."""

    @abstractmethod
    def is_ignored(self, name: str, before: Checkpoint, after: Checkpoint, reader: Checkpoint) -> bool:
        """Return whether a trainer's loader gets the same checkpoint with the old and with the new version of a file.

        An edit writes such a file before or after the index file. If it is killed in between, a loader finds the other
        version. This adapter itself may refuse such a mixture, but must not read it as another checkpoint.

        Args:
            name: a file of `output_files` of either checkpoint, other than the index file.
            before: the checkpoint before the edit.
            after: the checkpoint after the edit.
            reader: `before` or `after`: the one whose index file the reader has opened.
        """

    @abstractmethod
    def read_overlay(self, path: Path, staged: Path, removed: Collection[str], context: ReadContext) -> Checkpoint:
        """Read the directory as it will be after an edit.

        Args:
            path: the directory.
            staged: a directory. Its files replace files of `path` with the same relative path.
            removed: relative paths of files to treat as missing.
            context: as for `read`.
        """

    @abstractmethod
    def foreign_files(self, path: Path) -> list[Path]:
        """List the entries of the directory `path` that are not part of a checkpoint of this format."""
