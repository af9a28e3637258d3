"""The paths of a modular directory's files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vraxion_ckpt.plugin_api import InconsistentError
from vraxion_ckpt_adapters.modular.meta import META
from vraxion_ckpt_adapters.modular.shards import SHARD, list_shards

ROUTER_STATE = "system/router.state"


def root_of(path: Path) -> Path:
    """Return the checkpoint's directory, given its own path or the path of its router.state."""
    is_router = path.name == "router.state" and path.parent.name == "system"
    return path.parent.parent if is_router else path


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint. During an edit, some of them are staged in another directory.

    Attributes:
        root: the checkpoint's directory.
        staged: a directory of the same layout, whose files replace those in `root`.
        removed: paths below `root` of files to ignore.
    """

    root: Path
    staged: Path | None = None
    removed: frozenset[str] = frozenset()

    def path(self, name: str) -> Path:
        """Return the path of a file, given its path relative to the directory."""
        over = self.staged / name if self.staged else None
        return over if over is not None and over.exists() else self.root / name

    def check_links(self) -> None:
        """Reject folders and files that are links to a place outside the directory.

        Raises:
            InconsistentError: a link leads out of the directory.
        """
        for place in (self.root / "system", self.path(ROUTER_STATE), self.root / "experts", self.path(META)):
            if place.is_symlink() and not place.resolve().is_relative_to(self.root.resolve()):
                raise InconsistentError("is a link that leads out of the checkpoint", path=place)

    def shards(self) -> tuple[dict[int, str], list[Path]]:
        """Return the path of each shard by expert id, without opening the files, and the paths with malformed names."""
        found, malformed = list_shards(self.root / "experts")
        if self.removed:
            gone = {f"{self.root}/{name}" for name in self.removed}
            found = {i: path for i, path in found.items() if path not in gone}
        return found | self.staged_shards(), malformed

    def staged_shards(self) -> dict[int, str]:
        """Return the shards that an edit has staged."""
        return list_shards(self.staged / "experts")[0] if self.staged else {}


def foreign_files(root: Path) -> list[Path]:
    """Return the entries of a directory that are not part of the layout."""
    if not root.is_dir():
        return []
    return sorted(root / name for name in _foreign_below(os.fspath(root), ""))


def _foreign_below(root: str, folder: str) -> Iterator[str]:
    """Yield the relative paths of the entries of a folder, and of its folders, that are not part of the layout."""
    ours = {"system", "experts", ROUTER_STATE, META}
    with suppress(PermissionError), os.scandir(f"{root}/{folder}") as entries:
        for entry in entries:
            name = folder + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if name not in ours and not (folder == "experts/" and not is_folder and SHARD.fullmatch(entry.name)):
                yield name
            if is_folder:
                yield from _foreign_below(root, f"{name}/")
