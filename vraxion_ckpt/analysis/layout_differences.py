"""Compare what depends on the layout of the files: the order of tensors, ties, and the files beside the weights.

A safetensors file that other software wrote states neither the order of the state dict, nor module versions, nor which
names share memory. What a file cannot state is not a difference, but is reported as a note.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vraxion_ckpt.analysis.changes import Change
from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.shared_memory import sharing, without_tied
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.wording import listed

_PIECE = 2**20  # bytes that are compared at a time


def as_stated_by(other: Checkpoint, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """Return a checkpoint with what its files do not state, as another checkpoint states it.

    Args:
        other: the checkpoint that it will be compared with.
        checkpoint: its experts are open.

    Returns:
        the checkpoint, with the ties, the order and the module versions of `other` if its own files do not state any,
        and a note for each of these.
    """
    if checkpoint.origin.is_ordered:
        return checkpoint, []
    notes = []
    where = checkpoint.origin.path
    core = checkpoint.core.references()
    for names in _ties(other):
        known = [name for name in names if name in core]
        if known and all(same_bits(core[known[0]], core[name]) for name in known[1:]):
            core |= dict.fromkeys(names, core[known[0]])
            notes.append(f"{where} cannot state that {' and '.join(names)} share memory")
    ordered: dict[str, TensorRef] = {name: core[name] for name in other.core if name in core}
    ordered |= {name: tensor for name, tensor in core.items() if name not in ordered}
    head = checkpoint.head
    if head is not None and other.head is not None:
        experts = {i: head.experts[i] for i in other.head.experts if i in head.experts}
        head = replace(head, experts={**experts, **head.experts}, position=other.head.position)
    aligned = replace(checkpoint, core=TensorDict(ordered), head=head)
    stored = dict.fromkeys(checkpoint.tensor_names())
    if [name for name in aligned.tensor_names() if name in stored] != list(stored):
        notes.append(f"the order of the tensors is not compared: the writer of {where} has sorted them")
    if checkpoint.metadata is None and other.metadata is not None:
        aligned = replace(aligned, metadata=other.metadata)
        notes.append(f"module versions are not compared: {where} states none")
    return aligned, notes


def _ties(checkpoint: Checkpoint) -> list[list[str]]:
    """Return groups of names of the same tensor outside the head."""
    groups = sharing(checkpoint.core.references().items())
    return [[name for name, _ in group] for group in groups if len(without_tied(group)) == 1]


def neighbour_changes(a: Checkpoint, b: Checkpoint) -> tuple[list[Change], list[str]]:
    """Compare the files beside the weights byte by byte.

    Returns:
        the changes if both checkpoints are folders of the same format, otherwise a note if there are such files.
    """
    old, new = ([neighbour.name for neighbour in each.origin.neighbours] for each in (a, b))
    if not old and not new:
        return [], []
    roots = [each.origin.path or Path() for each in (a, b)]
    if not all(root.is_dir() for root in roots) or a.origin.format != b.origin.format:
        return [], [f"only {roots[0] if old else roots[1]} has files beside the weights: {listed(old or new)}"]
    changes = []
    for name in dict.fromkeys([*old, *new]):
        files = [root / name if name in names else None for root, names in zip(roots, (old, new), strict=True)]
        sizes = [None if file is None else f"file of {file.stat().st_size} bytes" for file in files]
        before, after = (None if file is None else name for file in files)
        if files[0] is None or files[1] is None:
            what = "added" if files[0] is None else "removed"
            changes.append(Change(what=what, before=before, after=after, old=sizes[0], new=sizes[1]))
        elif not _same_bytes(files[0], files[1]):
            changes.append(Change(what="changed", before=before, after=after, old=sizes[0], new=sizes[1]))
    return changes, []


def _same_bytes(a: Path, b: Path) -> bool:
    if a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as one, b.open("rb") as other:
        while piece := one.read(_PIECE):
            if piece != other.read(len(piece)):
                return False
    return True
