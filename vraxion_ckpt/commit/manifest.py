"""Manifests: the size and SHA-256 of each file of a checkpoint, to detect damage in any format.

A manifest is a separate JSON file. It holds no times and no absolute paths, so the manifests of equal checkpoints
differ only in the checkpoint's name.
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

# The path in a manifest for a checkpoint that is a single file.
SELF = "."


class FileDigest(Fact):
    """The size and digest of a file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Facts):
    """The digests of a checkpoint's files."""

    kind_of_facts: ClassVar[str] = "manifest"

    checkpoint: str
    """The checkpoint's name when the manifest was written."""
    format: str
    files: dict[str, FileDigest]
    """The digests by path relative to the checkpoint. A checkpoint that is a single file has the path ``.``."""


def make_manifest(checkpoint: str, format_name: str, files: Mapping[str, Path]) -> Manifest:
    """Read the files of a checkpoint and return their digests.

    Args:
        checkpoint: the checkpoint's name.
        format_name: the checkpoint's format.
        files: the files to read, by their path relative to the checkpoint.

    Raises:
        StorageError: a file cannot be read.
    """
    sizes = {name: file.stat().st_size for name, file in files.items()}
    with progress.progress_bar("digests", sum(sizes.values())) as count:
        digests = {}
        for name, file in sorted(files.items()):
            digests[name] = FileDigest(bytes=sizes[name], sha256=_sha256(file))
            count(sizes[name])
    return Manifest(checkpoint=checkpoint, format=format_name, files=digests)


def by_name(root: Path, files: Iterable[Path]) -> dict[str, Path]:
    """Return files by their path relative to the checkpoint `root`."""
    return {SELF if file == root else file.relative_to(root).as_posix(): file for file in files}


def dump_manifest(manifest: Manifest) -> bytes:
    """Return a manifest as JSON."""
    return (json.dumps(manifest.as_json(), indent=2, ensure_ascii=False) + "\n").encode()


def load_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        UsageError: the file does not exist or is not a regular file.
        CorruptError: the file is not JSON.
        InconsistentError: the file is not a manifest of this version, or lists a path outside the checkpoint.
        LimitError: the file is too large or nested too deeply.
        StorageError: the file cannot be read.
    """
    data = json_files.load_json(path)
    schema = Manifest.schema_name()
    if not isinstance(data, dict) or data.pop("schema", None) != schema:
        raise InconsistentError("is not a manifest of this version", path=path, key="schema", hint=f"expected {schema}")
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = refusals(error, Manifest)[0]
        raise InconsistentError(first.what, path=path, key=first.key) from None
    for name in manifest.files:
        if not _is_below(name):
            raise InconsistentError("is not a path inside the checkpoint", path=path, key=name)
    return manifest


def described_by(path: Path) -> str | None:
    """Return the name of the checkpoint that a manifest describes; None if the file is not a manifest."""
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
    """Yield the path of each file that differs from the manifest, and the difference.

    Args:
        manifest: the expected files.
        root: the path of the checkpoint.
        files: the files that belong to the checkpoint.

    Raises:
        StorageError: a file cannot be read.
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
                yield name, "is a link to a file outside the checkpoint"
            elif (size := file.stat().st_size) != expected.bytes:
                yield name, f"has {size} bytes, but {expected.bytes} in the manifest"
            elif _sha256(file) != expected.sha256:
                yield name, "has another sha256 than in the manifest"
            count(expected.bytes)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
