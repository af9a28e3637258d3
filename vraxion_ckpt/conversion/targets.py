"""Where a result may go: its format, and which places must not be written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.commit.manifest import described_by
from vraxion_ckpt.commit.staging import check_target
from vraxion_ckpt.errors import CkptWarning, UsageError
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.plugins.discovery import AdapterLike, adapters, resolve_adapter
from vraxion_ckpt.plugins.options import configure
from vraxion_ckpt.plugins.transform import Step
from vraxion_ckpt.reading.opening import PathLike, detects, file_suffixes
from vraxion_ckpt.wording import listed


def detect_target(dst: PathLike, to: AdapterLike | None = None) -> tuple[Adapter, Path]:
    """Return the adapter and the final path for a target that may not exist yet.

    A symbolic link is followed, so that it still is one afterwards.
    """
    text = os.fspath(dst)
    target = Path(os.path.realpath(text))
    known = adapters()
    if to is not None:
        adapter = resolve_adapter(to)
    else:
        found = _by_suffix(text, known.values())
        if target.is_dir():
            found = [a for a in known.values() if detects(a, target)] or found
        if len(found) != 1:
            choices = ", ".join(f"*{suffix} → {a.name}" for a in known.values() for suffix in a.suffixes)
            raise UsageError("its name does not tell the format", path=text, hint=f"pass --to, or use {choices}")
        adapter = configure(found[0], {})
    if not target.name:
        raise UsageError("is no place to write to", path=text)
    if target.exists() and not (target.is_dir() or target.is_file()):
        raise UsageError("is neither a file nor a directory, and is not replaced", path=target)
    is_directory = adapter_calls.is_directory(adapter)
    if target.exists() and target.is_dir() != is_directory:
        kind = "directory" if is_directory else "file"
        raise UsageError(f"with these options {adapter.name} is a {kind}, and something else is there", path=target)
    if text.endswith("/") and not is_directory:
        raise UsageError(f"with these options {adapter.name} is a file, and the name ends in /", path=text)
    if is_directory and text.endswith(file_suffixes(type(adapter))):
        raise UsageError(f"with these options {adapter.name} is a directory, and the name is that of a file", path=text)
    return adapter, target


def _by_suffix(text: str, known: Iterable[type[Adapter]]) -> list[type[Adapter]]:
    """Return the adapters of which the longest suffix fits: ``x.abc/`` is not just any directory."""
    fits = [(len(suffix), adapter) for adapter in known for suffix in adapter.suffixes if text.endswith(suffix)]
    longest = max((length for length, _ in fits), default=0)
    return [adapter for length, adapter in fits if length == longest]


def formats_named(name: str) -> list[str]:
    """Return the formats whose ending a file's name has."""
    return [adapter.name for adapter in adapters().values() if name.lower().endswith(file_suffixes(adapter))]


def say_what_names_deny(targets: Iterable[tuple[Path, Adapter]], side_targets: Iterable[SideTarget]) -> None:
    """Warn of each file or directory whose name has the ending of another format than it is written in."""
    written = [*((place, adapter.name) for place, adapter in targets), *((each.path, None) for each in side_targets)]
    for place, kind in written:
        named = formats_named(place.name)
        if named and kind not in named:
            what = kind or "a file beside the checkpoint"
            message = f"{place} is written as {what}, and its name is that of {' or '.join(named)}"
            warnings.warn(message, CkptWarning, stacklevel=3)


def check_places(source: Path, target: Path, adapter: Adapter, *, overwrite: bool) -> None:
    """Refuse a target that is the source, lies inside it or around it, or holds what is not ours to replace."""
    real = Path(os.path.realpath(source))
    if source.exists() and (real == target or (target.exists() and real.samefile(target))):
        raise UsageError("source and target are the same", path=target, hint="write to a new path")
    if real in target.parents and real.is_dir():
        raise UsageError("the target lies inside the source", path=target, hint="write to a path outside it")
    if target in real.parents:
        raise UsageError("the source lies inside the target", path=target, hint="write to a path beside it")
    check_target(target, overwrite=overwrite)
    foreign: list[Path] = []
    if target.exists() and adapter_calls.is_directory(adapter):
        told = adapter_calls.foreign_files(adapter, target)
        foreign = sorted(target.iterdir()) if told is None else told
    if foreign:
        names = listed([each.name for each in foreign], 3)
        raise UsageError(
            f"holds files that are no part of a {adapter.name} checkpoint ({names}); replacing it would delete them",
            path=target,
            hint="write to a new path",
        )


def check_apart(target: Path, before: Checkpoint) -> None:
    """Refuse to write into the source, whose extent is known only now that it is open."""
    root = Path(os.path.realpath(before.origin.path or "."))
    files = {Path(os.path.realpath(source.path)) for source in before.sources}
    if target == root or target in files or root in target.parents:
        raise UsageError("lies inside the source", path=target, hint="write to a path outside it")
    if target in root.parents or any(target in file.parents for file in files):
        raise UsageError("the source lies inside it", path=target, hint="write to a path beside it")


def files_read(chain: Sequence[Step], side_files: dict[Path, bytes]) -> set[Path]:
    """Return the files and directories that options of the chain name beside those it writes."""
    named = [value for step in chain for value in dict(step.transform).values() if isinstance(value, Path)]
    for path in side_files:
        if path in named:
            named.remove(path)
    return {Path(os.path.realpath(path)) for path in named}


@dataclass(frozen=True)
class SideTarget:
    """A file that is written beside a target.

    Attributes:
        path: its final path.
        replace: whether something is there that may be replaced; what appears there later may not.
    """

    path: Path
    replace: bool


def check_side_files(
    side_files: dict[Path, bytes], before: Checkpoint, target: Path, chain: Sequence[Step], *, overwrite: bool
) -> tuple[SideTarget, ...]:
    """Refuse side files over the source, the target, what the chain reads, or what must not be replaced.

    Returns:
        Where each of them goes.
    """
    inputs = files_read(chain, side_files)
    found = []
    for path in side_files:
        real = _check_beside(path, before, target, inputs)
        # One that says the same already may be of this very call, which was killed and is made again.
        check_target(real, overwrite=overwrite or _holds(real, side_files[path]))
        found.append(SideTarget(real, real.exists()))
    return tuple(found)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def check_manifest(
    path: Path,
    before: Checkpoint,
    target: Path,
    chain: Sequence[Step],
    side_files: dict[Path, bytes],
    *,
    overwrite: bool,
) -> SideTarget:
    """Refuse a manifest where a side file must not be, or over what is no manifest, or one of another checkpoint.

    Returns:
        Where it goes.
    """
    real = _check_beside(path, before, target, files_read(chain, side_files))
    if real.exists() and overwrite:
        described = described_by(real)
        if described is None:
            raise UsageError("is no manifest, and is not replaced by one", path=path)
        if described != target.name:
            raise UsageError(
                f"is the manifest of {described}, and is not replaced", path=path, hint="choose a new name"
            )
    check_target(real, overwrite=overwrite)
    return SideTarget(real, real.exists())


def check_inputs(places: Iterable[Path], chain: Sequence[Step], side_files: dict[Path, bytes], more: set[Path]) -> None:
    """Refuse to write over, around or into a file or directory that the chain reads, or a file of `more`."""
    for read in files_read(chain, side_files) | more:
        for place in places:
            if read == place or place in read.parents:
                hint = "choose a new name, or move what is read to a place outside it"
                raise UsageError(f"is, or holds, what this run reads: {read}", path=place, hint=hint)
            if read in place.parents:
                raise UsageError(
                    f"lies in a directory that this run reads, {read}", path=place, hint="choose a place outside it"
                )


def _check_beside(path: Path, before: Checkpoint, target: Path, inputs: set[Path]) -> Path:
    if "\0" in str(path):
        raise UsageError(f"{str(path)!r} is no path")
    real = Path(os.path.realpath(path))
    if real == target or target in real.parents:
        raise UsageError("a side file must not be, or lie in, the target", path=path)
    check_apart(real, before)
    if real in inputs:
        raise UsageError("a side file must not replace a file that the chain reads", path=path)
    if inputs.intersection(real.parents):
        raise UsageError("a side file must not lie in a directory that the chain reads", path=path)
    if real.is_dir():
        raise UsageError("is a directory, not a file to write", path=path)
    return real


def check_several(targets: Sequence[Path]) -> None:
    """Refuse places that are the same, or lie in each other."""
    for i, target in enumerate(targets):
        for other in targets[:i]:
            if target == other:
                raise UsageError("is to be written twice", path=target)
            if target in other.parents or other in target.parents:
                raise UsageError(f"lies inside what is also to be written, or around it: {other}", path=target)
