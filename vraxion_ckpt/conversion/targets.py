"""The format of a target, and the checks of the paths that a run writes."""

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
    """Return the adapter and the final path of a target, which may not exist yet.

    Symbolic links are resolved, so that they are kept.

    Args:
        dst: the target.
        to: the format; chosen by the name of the target if None.

    Raises:
        UsageError: the name does not determine the format, or the path cannot be written.
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
            raise UsageError("the name does not determine the format", path=text, hint=f"pass --to, or use {choices}")
        adapter = configure(found[0], {})
    if not target.name:
        raise UsageError("cannot be written to", path=text)
    if target.exists() and not (target.is_dir() or target.is_file()):
        raise UsageError("is neither a file nor a directory", path=target, hint="write to a new path")
    is_directory = adapter_calls.is_directory(adapter)
    if target.exists() and target.is_dir() != is_directory:
        kind = "directory" if is_directory else "file"
        raise UsageError(f"is not a {kind}, but with these options {adapter.name} writes a {kind}", path=target)
    if text.endswith("/") and not is_directory:
        raise UsageError(f"ends in /, but with these options {adapter.name} writes a file", path=text)
    if is_directory and text.endswith(file_suffixes(type(adapter))):
        raise UsageError(f"is the name of a file, but with these options {adapter.name} writes a directory", path=text)
    return adapter, target


def _by_suffix(text: str, known: Iterable[type[Adapter]]) -> list[type[Adapter]]:
    """Return the adapters with the longest matching suffix, so that ``.abc/`` has priority over ``/``."""
    fits = [(len(suffix), adapter) for adapter in known for suffix in adapter.suffixes if text.endswith(suffix)]
    longest = max((length for length, _ in fits), default=0)
    return [adapter for length, adapter in fits if length == longest]


def formats_named(name: str) -> list[str]:
    """Return the formats with a suffix that matches a file's name."""
    return [adapter.name for adapter in adapters().values() if name.lower().endswith(file_suffixes(adapter))]


def say_what_names_deny(targets: Iterable[tuple[Path, Adapter]], side_targets: Iterable[SideTarget]) -> None:
    """Warn about each file or directory whose name has the suffix of another format than the written one."""
    written = [*((place, adapter.name) for place, adapter in targets), *((each.path, None) for each in side_targets)]
    for place, kind in written:
        named = formats_named(place.name)
        if named and kind not in named:
            what = kind or "a side file"
            message = f"{place} is written as {what}, but its name has the suffix of {' or '.join(named)}"
            warnings.warn(message, CkptWarning, stacklevel=3)


def check_places(source: Path, target: Path, adapter: Adapter, *, overwrite: bool) -> None:
    """Check the path of a target before anything is read.

    Raises:
        UsageError: it is the source, is inside it or contains it, exists without `overwrite`, or contains foreign
            files.
    """
    real = Path(os.path.realpath(source))
    if source.exists() and (real == target or (target.exists() and real.samefile(target))):
        raise UsageError("source and target are the same", path=target, hint="write to a new path")
    if real in target.parents and real.is_dir():
        raise UsageError("the target is inside the source", path=target, hint="write to a path outside it")
    if target in real.parents:
        raise UsageError("the target contains the source", path=target, hint="write to another path")
    check_target(target, overwrite=overwrite)
    foreign: list[Path] = []
    if target.exists() and adapter_calls.is_directory(adapter):
        known = adapter_calls.foreign_files(adapter, target)
        foreign = sorted(target.iterdir()) if known is None else known
    check_nothing_deleted(target, adapter, [each.name for each in foreign])


def check_nothing_deleted(target: Path, adapter: Adapter, lost: Sequence[str]) -> None:
    """Refuse to replace a directory if files in it, named by `lost`, are not part of the new one.

    Raises:
        UsageError: there are any.
    """
    if lost:
        raise UsageError(
            f"contains files that are not part of a {adapter.name} checkpoint ({listed(lost, 3)}) and would be deleted",
            path=target,
            hint="write to a new path",
        )


def check_apart(target: Path, before: Checkpoint) -> None:
    """Check that a target is apart from the source, whose files are known after it was opened.

    Raises:
        UsageError: the target is inside the source or contains a part of it.
    """
    root = Path(os.path.realpath(before.origin.path or "."))
    files = {Path(os.path.realpath(source.path)) for source in before.sources}
    if target == root or target in files or root in target.parents:
        raise UsageError("is inside the source", path=target, hint="write to a path outside it")
    if target in root.parents or any(target in file.parents for file in files):
        raise UsageError("contains the source", path=target, hint="write to another path")


def files_read(chain: Sequence[Step], side_files: dict[Path, bytes]) -> set[Path]:
    """Return the paths in the options of the chain, except those that it writes."""
    named = [value for step in chain for value in dict(step.transform).values() if isinstance(value, Path)]
    for path in side_files:
        if path in named:
            named.remove(path)
    return {Path(os.path.realpath(path)) for path in named}


@dataclass(frozen=True)
class SideTarget:
    """The target of a side file or manifest.

    Attributes:
        path: the final path.
        replace: whether a file exists there and may be replaced. A file that appears later may not.
    """

    path: Path
    replace: bool


def check_side_files(
    side_files: dict[Path, bytes], before: Checkpoint, target: Path, chain: Sequence[Step], *, overwrite: bool
) -> tuple[SideTarget, ...]:
    """Check where the side files go.

    Returns:
        The target of each side file.

    Raises:
        UsageError: a side file would be written into the source, the target or an input of the chain, or exists
            without `overwrite`.
    """
    inputs = files_read(chain, side_files)
    found = []
    for path in side_files:
        real = _check_side_target(path, before, target, inputs)
        # An identical file may have been written by the same run, which was killed and is now repeated.
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
    """Check where a manifest goes.

    Returns:
        The target of the manifest.

    Raises:
        UsageError: a side file could not be written there, or the path has a file other than a manifest of `target`.
    """
    real = _check_side_target(path, before, target, files_read(chain, side_files))
    if real.exists() and overwrite:
        described = described_by(real)
        if described is None:
            raise UsageError("is not a manifest and cannot be replaced", path=path, hint="choose a new name")
        if described != target.name:
            raise UsageError(
                f"is the manifest of {described} and cannot be replaced", path=path, hint="choose a new name"
            )
    check_target(real, overwrite=overwrite)
    return SideTarget(real, real.exists())


def check_inputs(places: Iterable[Path], chain: Sequence[Step], side_files: dict[Path, bytes], more: set[Path]) -> None:
    """Check that no written path is, contains or is inside a path that the chain reads, or a path of `more`.

    Raises:
        UsageError: one does.
    """
    for read in files_read(chain, side_files) | more:
        for place in places:
            if read == place or place in read.parents:
                hint = "choose a new name, or move the input to another directory"
                raise UsageError(f"is or contains an input of this run: {read}", path=place, hint=hint)
            if read in place.parents:
                raise UsageError(
                    f"is inside a directory that this run reads: {read}", path=place, hint="choose a path outside it"
                )


def _check_side_target(path: Path, before: Checkpoint, target: Path, inputs: set[Path]) -> Path:
    if "\0" in str(path):
        raise UsageError(f"{str(path)!r} is not a valid path")
    real = Path(os.path.realpath(path))
    if real == target or target in real.parents:
        raise UsageError("a side file must not be the target or inside it", path=path)
    check_apart(real, before)
    if real in inputs:
        raise UsageError("a side file must not replace a file that the chain reads", path=path)
    if inputs.intersection(real.parents):
        raise UsageError("a side file must not be inside a directory that the chain reads", path=path)
    if real.is_dir():
        raise UsageError("is a directory, not a file to write", path=path)
    return real


def check_several(targets: Sequence[Path]) -> None:
    """Check that no target is the same as another or inside another.

    Raises:
        UsageError: one is.
    """
    for i, target in enumerate(targets):
        for other in targets[:i]:
            if target == other:
                raise UsageError("is the path of two outputs", path=target, hint="choose another name for one")
            if target in other.parents or other in target.parents:
                raise UsageError(f"is inside another output, or contains it: {other}", path=target)
