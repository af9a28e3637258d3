"""The paths of a modular directory's files."""

from __future__ import annotations

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

    def shards(self) -> dict[int, Path]:
        """Return the path of each shard by expert id, without opening the files."""
        found = list_shards(self.root / "experts")
        found = {i: path for i, path in found.items() if f"experts/{path.name}" not in self.removed}
        return found | (list_shards(self.staged / "experts") if self.staged else {})


def foreign_files(root: Path) -> list[Path]:
    """Return the entries of a directory that are not part of the layout."""
    if not root.is_dir():
        return []
    ours = {root / "system", root / "experts", root / ROUTER_STATE, root / META}
    return [
        entry
        for entry in sorted(root.rglob("*"))
        if entry not in ours and not (entry.parent == root / "experts" and _is_shard(entry))
    ]


def _is_shard(path: Path) -> bool:
    return SHARD.fullmatch(path.name) is not None and (path.is_symlink() or not path.is_dir())
