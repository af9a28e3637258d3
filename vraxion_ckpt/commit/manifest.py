"""Manifests: the size and SHA-256 of every file of a checkpoint, so that a flipped bit is found in any format.

A manifest is a JSON file of its own, beside the checkpoint or wherever one keeps it. It holds nothing that differs
between two identical checkpoints, so equal ones have equal manifests but for their name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import ClassVar

from pydantic import Field, ValidationError

from vraxion_ckpt.errors import CkptError, InconsistentError, StorageError
from vraxion_ckpt.support import json_files, progress
from vraxion_ckpt.support.json_models import Fact, Facts
from vraxion_ckpt.support.model_errors import refusals

# The path of a checkpoint that is one file.
SELF = "."


class FileDigest(Fact):
    """What a file's bytes are known by."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Facts):
    """The digests of a checkpoint's files."""

    kind_of_facts: ClassVar[str] = "manifest"

    checkpoint: str
    """The checkpoint's name when it was written; it may have another one by now."""
    format: str
    files: dict[str, FileDigest]
    """By path below the checkpoint; ``.`` is a checkpoint that is one file."""


def make_manifest(checkpoint: str, format_name: str, files: Mapping[str, Path]) -> Manifest:
    """Read files and return their digests.

    Args:
        checkpoint: its name.
        format_name: its format.
        files: where each file lies, by its path below the checkpoint.
    """
    sizes = {name: file.stat().st_size for name, file in files.items()}
    with progress.progress_bar("digests", sum(sizes.values())) as count:
        digests = {}
        for name, file in sorted(files.items()):
            digests[name] = FileDigest(bytes=sizes[name], sha256=_sha256(file))
            count(sizes[name])
    return Manifest(checkpoint=checkpoint, format=format_name, files=digests)


def by_name(root: Path, files: Iterable[Path]) -> dict[str, Path]:
    """Return files by their path below a checkpoint."""
    return {SELF if file == root else file.relative_to(root).as_posix(): file for file in files}


def dump_manifest(manifest: Manifest) -> bytes:
    """Return a manifest as it is written."""
    return (json.dumps(manifest.as_json(), indent=2, ensure_ascii=False) + "\n").encode()


def load_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        UsageError: there is no such file, or it is not a regular one.
        CorruptError: it is no JSON.
        InconsistentError: it is no manifest, or of a version that is not known, or names a file outside a checkpoint.
    """
    data = json_files.load_json(path)
    if not isinstance(data, dict) or data.pop("schema", None) != Manifest.schema_name():
        raise InconsistentError("is no manifest", path=path, key="schema", hint=f"expected {Manifest.schema_name()}")
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = refusals(error, Manifest)[0]
        raise InconsistentError(first.what, path=path, key=first.key) from None
    for name in manifest.files:
        if not _is_below(name):
            raise InconsistentError("is no path below a checkpoint", path=path, key=name)
    return manifest


def described_by(path: Path) -> str | None:
    """Return the name of the checkpoint that a manifest describes; None if the file is no manifest."""
    try:
        return load_manifest(path).checkpoint
    except CkptError:
        return None


def _is_below(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return name == SELF or bool(
        parts
        and str(PurePosixPath(name)) == name
        and ".." not in parts
        and parts[0] != "/"
        and not set(name) & set("\\\0")
    )


def compare_manifest(manifest: Manifest, root: Path, files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Yield the path and the fault of every file that is not as the manifest says.

    Args:
        manifest: what the files should be.
        root: the checkpoint.
        files: the files that it has, other people's left out.
    """
    found = by_name(root, files)
    for name in sorted(found.keys() - manifest.files.keys()):
        yield name, "is not in the manifest"
    with progress.progress_bar("digests", sum(digest.bytes for digest in manifest.files.values())) as count:
        for name, expected in manifest.files.items():
            file = found.get(name)
            if file is None:
                yield name, "is missing"
            elif file != root and not file.resolve().is_relative_to(root.resolve()):
                yield name, "is a link that leads out of the checkpoint"
            elif (size := file.stat().st_size) != expected.bytes:
                yield name, f"has {size} bytes, the manifest says {expected.bytes}"
            elif _sha256(file) != expected.sha256:
                yield name, "is not what it was: its sha256 differs"
            count(expected.bytes)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
