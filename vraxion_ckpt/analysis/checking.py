"""Check a checkpoint and report all findings instead of the first error.

Errors: a reader refuses the checkpoint, no runtime can load it, or it contradicts its manifest. Warnings: it loads, but
something is probably not intended. Notes: further information.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Unpack

from vraxion_ckpt.analysis.binding_findings import about_binding, finding_of
from vraxion_ckpt.analysis.content_findings import about_contents, about_values
from vraxion_ckpt.analysis.findings import Finding, Severity
from vraxion_ckpt.checkpoint.entries import refuse_missing
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.provenance import Origin
from vraxion_ckpt.commit import manifest as manifests
from vraxion_ckpt.commit.staging import was_interrupted
from vraxion_ckpt.errors import CkptWarning, memory_errors
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter, Faults
from vraxion_ckpt.reading.opening import (
    PathLike,
    bound_if_possible,
    check_allowed,
    detect_source,
    files_of,
    how_to_recover,
    os_errors_named,
)
from vraxion_ckpt.reading.read_options import ReadKeywords, ReadOptions
from vraxion_ckpt.support import progress
from vraxion_ckpt.support.garbage import rare_collections
from vraxion_ckpt.support.json_models import Facts
from vraxion_ckpt.wording import count, listed


class Checked(Facts):
    """The result of `check`."""

    kind_of_facts: ClassVar[str] = "check"

    path: Path
    format: str
    sound: bool
    """Whether no finding is an error."""
    findings: tuple[Finding, ...]
    """All findings, errors first."""
    files: int
    tensors: int
    """Number of tensors that were checked, including optimizer slots and tensors of the payload."""
    bytes: int
    manifest: Path | None
    """The manifest that the files were compared with."""


@memory_errors()
@rare_collections()
def check(path: PathLike, *, manifest: PathLike | None = None, **reading: Unpack[ReadKeywords]) -> Checked:
    """Read all of a checkpoint and return every finding: files, checksums, invariants, values.

    Args:
        path: a file or a directory.
        manifest: a manifest that ``convert`` or ``edit`` wrote. The files are compared with its digests.
        reading: see `ReadOptions`.

    Returns:
        The findings.

    Raises:
        UsageError: the path or the manifest does not exist, or an option is wrong.
        UnknownFormatError: no adapter, or more than one, recognises the path.
        InconsistentError: the manifest is not valid.
    """
    options = ReadOptions.of("check", reading)
    with os_errors_named(path):
        root = Path(path)
        adapter = detect_source(root, options.from_)
        check_allowed(adapter, options.allow_globals)
        listed = manifests.load_manifest(Path(manifest)) if manifest is not None else None
        findings: list[Finding] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CkptWarning)
            checkpoint, tensors, size = _examine(adapter, root, findings, options)
        warned = dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, CkptWarning))
        findings += [Finding.warning("readable", text) for text in warned]
        origin = checkpoint.origin if checkpoint is not None else Origin()
        root = origin.path or root
        files = files_of(adapter, root, origin.leftovers)
        findings += _about_files(adapter, root, files)
        if listed is not None:
            findings += [
                Finding.error("manifest", what, where=root.name if name == manifests.SELF else name)
                for name, what in manifests.compare_manifest(listed, root, files)
            ]
    order = list(Severity)
    findings.sort(key=lambda finding: order.index(finding.severity))
    return Checked(
        path=root,
        format=adapter.name,
        sound=not any(finding.severity is Severity.ERROR for finding in findings),
        findings=tuple(findings),
        files=len(files),
        tensors=tensors,
        bytes=size,
        manifest=Path(manifest) if manifest is not None else None,
    )


def _examine(
    adapter: Adapter, root: Path, findings: list[Finding], options: ReadOptions
) -> tuple[Checkpoint | None, int, int]:
    """Read and check everything. Return the checkpoint, the number of checked tensors, and their bytes."""
    faults = Faults()
    tensors = size = 0
    checkpoint = adapter_calls.examine(adapter, root, faults, options.allow_globals, options.drop_keys)
    if checkpoint is not None:
        refuse_missing(options.drop_keys, checkpoint)
        for expert in checkpoint.head.experts.values() if checkpoint.head else ():
            faults.attempt(partial(getattr, expert, "tensors"))
        _verify(checkpoint, faults)
        bound, refused = bound_if_possible(checkpoint, options)
        findings += about_binding(checkpoint, bound, refused)
        findings += about_contents(bound)
        tensors, size = about_values(bound, findings)
        faults.attempt(checkpoint.sources.check_unchanged)
    findings += [finding_of("readable", error) for error in faults.errors]
    return checkpoint, tensors, size


def _verify(checkpoint: Checkpoint, faults: Faults) -> None:
    sources = list(checkpoint.sources)
    with progress.progress_bar("checksums", sum(source.fingerprint.size for source in sources)) as count:
        for source in sources:
            faults.attempt(source.verify)
            count(source.fingerprint.size)


def _about_files(adapter: Adapter, root: Path, files: Sequence[Path]) -> Iterator[Finding]:
    real = Path(os.path.realpath(root))
    if was_interrupted(real):
        yield Finding.error(
            "interrupted edit",
            "an edit of this checkpoint was interrupted",
            where=str(root),
            hint=how_to_recover(root),
        )
    foreign = (adapter_calls.foreign_files(adapter, root) or []) if root.is_dir() else []
    known = set(files)
    others = [path for path in foreign if path.is_file() and path not in known]
    if others:
        names = listed([path.relative_to(root) for path in others], 4)
        what = f"the directory has {count(len(others), 'file')} that are not part of the checkpoint: {names}"
        yield Finding.note("foreign files", what)
