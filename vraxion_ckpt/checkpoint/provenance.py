"""Where a checkpoint and its tensors come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from vraxion_ckpt.checkpoint.dialects import Dialect


@dataclass(frozen=True)
class Ancestor:
    """The source of the tensors under one prefix of a changed head.

    Attributes:
        prefix: the prefix of the source tensors before the step, or the whole name of one tensor.
        noise: pairs of standard deviation and seed prefix, one for each time that noise was added. The seed is the
            seed prefix followed by the leaf name. Empty for an exact copy.
    """

    prefix: str
    noise: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Record:
    """One step in a checkpoint's history: the plugin, its options and package, the source, and a summary."""

    name: str
    options: Mapping[str, Any]
    distribution: str
    version: str
    source: str
    summary: str


class StaleAfter(StrEnum):
    """The change of the model after which a neighbour no longer fits it.

    NOTHING: it always fits.
    NEW_STRUCTURE: it states names, dtypes or shapes of tensors.
    NEW_VALUES: it belongs to the values of the tensors.
    """

    NOTHING = "nothing"
    NEW_STRUCTURE = "new structure"
    NEW_VALUES = "new values"


@dataclass(frozen=True)
class Neighbour:
    """A file in a checkpoint's folder that belongs to the checkpoint and that its format does not read.

    For example, a Hugging Face folder has a configuration and a tokenizer beside the weights. A conversion into another
    such folder copies them byte for byte if they still fit the result.

    Attributes:
        name: its path relative to the folder, with slashes.
        holds: what it holds that a user may expect to be converted, such as ``training state``; empty if nothing.
        stale_after: the change of the model after which it no longer fits.
    """

    name: str
    holds: str = ""
    stale_after: StaleAfter = StaleAfter.NOTHING


@dataclass(frozen=True)
class Origin:
    """The format and path of a checkpoint, and its dialects.

    A dialect is the variant of a format that a file was written in, as plain JSON-like values.

    Attributes:
        format: name of the format.
        path: the file or directory that was read.
        dialects: by format name, the dialect in which that format's writer must write. An adapter reads and replaces
            its own entry and keeps the others.
        local: data that only a writer of the same format uses. It is not carried into other formats.
        leftovers: relative paths of files in the checkpoint's directory that belong to the format and that no loader
            reads, such as shards of an earlier save. An edit in place keeps those that no new file replaces.
        dropped: the entries that the user has left out on reading.
        neighbours: the files beside the checkpoint's own.
        is_ordered: whether the order of the tensors is that of the state dict. Some writers sort them.
        known_dialects: the declared dialects, by which trainers are recognised. They are not stored.
    """

    format: str = ""
    path: Path | None = None
    dialects: Mapping[str, Any] = field(default_factory=dict)
    local: Mapping[str, Any] = field(default_factory=dict)
    leftovers: tuple[str, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    is_ordered: bool = True
    dropped: tuple[str, ...] = ()
    known_dialects: tuple[Dialect, ...] = field(default=(), compare=False, repr=False)

    def dialect(self, name: str) -> Any:
        """Return the dialect recorded for a format, or None."""
        return self.dialects.get(name)

    def with_dialect(self, name: str, dialect: Any) -> Origin:
        """Return an origin with a format's dialect replaced."""
        return replace(self, dialects={**self.dialects, name: dialect})

    def without_dialects(self, *names: str) -> Origin:
        """Return an origin without the dialects of these formats."""
        return replace(self, dialects={name: each for name, each in self.dialects.items() if name not in names})
