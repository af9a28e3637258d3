"""The base classes of adapters: each reads and writes one file format."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.errors import CkptError, OutOfMemoryError, PluginError
from vraxion_ckpt.plugins.options import Plugin
from vraxion_ckpt.plugins.read_context import ReadContext

_T = TypeVar("_T")


@dataclass(frozen=True)
class Loss:
    """Something that a checkpoint has and a format cannot hold."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


@dataclass(frozen=True)
class OutputFile:
    """One file that an `IncrementalDirectoryAdapter` would write.

    Attributes:
        content: compares equal for two files with the same content. It is compared instead of opening the files.
        write: writes the file to a path that does not exist yet.
        size: returns its size in bytes.
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

    A format whose checkpoints are directories is edited in place by writing a whole new directory and exchanging the
    two. An `IncrementalDirectoryAdapter` writes only the files that change.

    Attributes:
        suffixes: endings of a target's name that mean this format; ``/`` means a directory.
        loads_pickles: whether files of this format are pickles, so that ``allow_globals`` has a meaning.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    loads_pickles: ClassVar[bool] = False

    @property
    def is_directory(self) -> bool:
        """Whether a target of this format, with these options, is a directory."""
        return False

    @classmethod
    @abstractmethod
    def detect(cls, path: Path) -> bool:
        """Return whether `path` is of this format, judged by its content.

        It is called for every path, so it must be cheap and must not raise.
        """

    @abstractmethod
    def read(self, path: Path, context: ReadContext) -> Checkpoint:
        """Read a checkpoint. Map tensors instead of reading them where the format allows it.

        Args:
            path: a file or a directory.
            context: opens files and registers them; it becomes the checkpoint's `sources`.

        Returns:
            The checkpoint; an `UnboundCheckpoint` if the optimizer's parameters are numbered, not named.

        Raises:
            SourceError: what is wrong with the file, and where.
        """

    def examine(self, path: Path, faults: Faults, context: ReadContext) -> Checkpoint | None:
        """Read a checkpoint as far as possible, and note every fault instead of stopping at the first.

        A format of several files examines each of them here. The caller checks the contents of the checkpoint that is
        returned, and the checksums of the files that were mapped.

        Returns:
            The checkpoint, or None if it cannot be read as a whole.
        """
        return faults.attempt(lambda: self.read(path, context))

    def dialect(self, checkpoint: Checkpoint) -> str:  # noqa: ARG002 - most formats have one dialect
        """Describe the variant of this format that a checkpoint was read from; empty if there is only one."""
        return ""

    def losses(self, checkpoint: Checkpoint) -> list[Loss]:  # noqa: ARG002 - most formats lose nothing
        """List what this format cannot hold of `checkpoint`. It is asked before anything is written."""
        return []

    def held(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the part of the checkpoint that this format, with these options, can hold.

        `write` gets this checkpoint, and reading the result back must give the same. It lacks what `losses` lists.
        """
        return checkpoint

    @abstractmethod
    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write to `path`, which is staged: a file that does not exist yet, or an empty directory.

        The caller flushes to disk, reads back and renames to the target. The same checkpoint must give the same bytes.
        """

    def size(self, checkpoint: Checkpoint) -> int | None:  # noqa: ARG002 - not every format can tell
        """Return how many bytes `write` would write, or None if that is not known before writing."""
        return None

    def foreign_files(self, path: Path) -> list[Path] | None:  # noqa: ARG002 - not every format can tell
        """List what is in the directory `path` and not part of a checkpoint of this format.

        Such files are kept when the directory is edited, and a directory that has some is not replaced.

        Returns:
            The paths, or None if the format cannot tell. Then its directories are not edited in place, and none that
            has any file is replaced.
        """
        return None


class IncrementalDirectoryAdapter(Adapter):
    """Read and write a directory format file by file, so that an edit in place writes only what changes.

    Attributes:
        index_file: the file that a reader opens first and that determines which other files it opens, by its path
            below the directory. Exchanging it is the moment at which an edit takes effect.
    """

    index_file: ClassVar[str]

    @property
    def is_directory(self) -> bool:
        return True

    @abstractmethod
    def output_files(self, checkpoint: Checkpoint) -> Mapping[str, OutputFile]:
        """Return every file of the directory by its path below it. Opens no expert."""

    @abstractmethod
    def is_ignored(self, name: str, before: Checkpoint, after: Checkpoint, reader: Checkpoint) -> bool:
        """Return whether a reader gets the same checkpoint from either of two versions of a file.

        Args:
            name: a file other than the index file, among the `output_files` of either checkpoint or both.
            before: the checkpoint before the edit.
            after: the checkpoint after the edit.
            reader: the one of the two whose index file the reader has opened.
        """

    @abstractmethod
    def read_overlay(self, path: Path, staged: Path, removed: Collection[str], context: ReadContext) -> Checkpoint:
        """Read the directory as it will be after an edit.

        Args:
            path: the directory.
            staged: files below it replace those of `path` with the same names.
            removed: names of files that are to be read as missing.
            context: as for `read`.
        """

    @abstractmethod
    def foreign_files(self, path: Path) -> list[Path]:
        """List what is in the directory `path` and not part of a checkpoint of this format."""
