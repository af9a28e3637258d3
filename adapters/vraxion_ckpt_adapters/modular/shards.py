"""``experts/expert_<id>.pt``: a plain dict of leaf name → tensor for each expert."""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from vraxion_ckpt.plugin_api import (
    Checkpoint,
    CkptWarning,
    CorruptError,
    Expert,
    HeadKind,
    HeadNames,
    InconsistentError,
    OutputFile,
    ReadContext,
    StorageError,
    TensorRef,
    fills_storage,
    listed,
    named_references,
    save_torch_file,
    sharing,
    split_name,
    torch_file_size,
    unfit,
)

SHARD = re.compile(r"expert_([0-9]{3}|[1-9][0-9]{3,8})\.pt")


def shard_name(expert: int) -> str:
    """Return a shard's file name, in which the expert's id has at least three digits."""
    return f"expert_{expert:03d}.pt"


def list_shards(folder: Path) -> tuple[dict[int, str], list[Path]]:
    """Return the paths that are named like a shard, by expert id, and those whose names are malformed."""
    if not folder.is_dir():
        return {}, []
    try:
        names = os.listdir(folder)  # noqa: PTH208 - faster for thousands of files
    except OSError as error:
        raise StorageError.from_os_error(error, folder) from error
    place, found, malformed = os.fspath(folder), {}, []
    for name in names:
        if match := SHARD.fullmatch(name):
            found[int(match[1])] = f"{place}/{name}"
        elif name.startswith("expert_") and name.endswith(".pt"):
            malformed.append(folder / name)
    return {expert: found[expert] for expert in sorted(found)}, malformed


def check_names(malformed: Collection[Path]) -> None:
    """Raise InconsistentError if loaders would ignore a shard because of its name, for example expert_1.pt."""
    if malformed:
        message = "a shard must be named expert_<id>.pt, with an id of at least three digits"
        raise InconsistentError(message, path=min(malformed))


def below(shards: Mapping[int, str], num_experts: int) -> dict[int, str]:
    """Return the shards that a loader of a model with `num_experts` experts opens."""
    return {expert: path for expert, path in shards.items() if expert < num_experts}


def leftovers(shards: Mapping[int, str], num_experts: int) -> dict[int, Path]:
    """Return the shards, without folders, that a loader of a model with `num_experts` experts ignores."""
    ignored = {i: Path(path) for i, path in shards.items() if i >= num_experts}
    return {i: path for i, path in ignored.items() if path.is_symlink() or not path.is_dir()}


def warn_of_leftovers(ids: Sequence[int], why: str, root: Path) -> None:
    """Warn that some shards are ignored.

    Args:
        ids: the ids of the experts whose shards are ignored.
        why: the reason, as a clause that follows "because".
        root: the checkpoint's directory.
    """
    names = listed([shard_name(expert) for expert in ids])
    message = (
        f"{root / 'experts'}: {names} {'are' if len(ids) > 1 else 'is'} left from an earlier save and ignored, "
        f"as trainers do, because {why}; edit keeps such files, convert does not copy them"
    )
    warnings.warn(message, CkptWarning, stacklevel=4)


def check_file(expert: int, path: str) -> str:
    """Return the path of a shard. Raise InconsistentError if it is not a regular file or is empty."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise InconsistentError("a shard must be a regular file", path=Path(path))
    if not status.st_size:
        raise InconsistentError(f"the shard of expert {expert} is empty", path=Path(path))
    return path


def check_complete(shards: Collection[int], deleted: frozenset[int], num_experts: int, root: Path) -> None:
    """Raise InconsistentError if an expert has no shard and is not listed as deleted."""
    present = deleted.union(shards)
    if len(present) != num_experts:
        missing = next(i for i in range(len(present) + 1) if i not in present)
        message = f"{shard_name(missing)} is missing, but num_experts is {num_experts}"
        raise InconsistentError(message, path=root / "experts")


def shard_output(expert: Expert) -> OutputFile:
    """Describe the shard of an expert. Experts are compared by identity, so an untouched one is not opened."""
    return OutputFile(expert, partial(_save_shard, expert), partial(_shard_size, expert))


def _save_shard(expert: Expert, path: Path) -> None:
    save_torch_file(_content(expert), path)


def _shard_size(expert: Expert) -> int:
    return torch_file_size(_content(expert))


def _content(expert: Expert) -> dict[str, TensorRef]:
    """Return the content of an expert's shard: leaf name → tensor."""
    return {leaf: _compact(tensor) for leaf, tensor in expert.references().items()}


def leaves_by_expert(param_names: tuple[str, ...] | None, names: HeadNames) -> dict[int, set[str]]:
    """Return the leaf names of each expert's parameters that `param_names` lists, by expert id."""
    leaves: dict[int, set[str]] = {}
    for name in param_names or ():
        if name.startswith(names.experts) and (found := split_name(name, names)):
            leaves.setdefault(found[0], set()).add(found[1])
    return leaves


def load_shard(path: Path, expert: int, leaves: set[str] | None, context: ReadContext) -> dict[str, TensorRef]:
    """Open a shard.

    Raises:
        InconsistentError: the shard is damaged, is not a dict of tensors, or lacks one of `leaves`.
    """
    try:
        shard = context.load_torch_references(path)
    except CorruptError as error:
        message = f"the shard of expert {expert} is damaged: {error.message}"
        raise InconsistentError(message, path=path, key=error.key, hint=error.hint) from error
    if not isinstance(shard, dict) or not shard:
        raise InconsistentError(f"the shard of expert {expert} holds no tensors", path=path)
    for leaf, tensor in shard.items():
        if not isinstance(leaf, str) or not isinstance(tensor, TensorRef):
            raise InconsistentError(f"the shard of expert {expert} has an entry that is not a tensor", path=path)
    if leaves is not None and not leaves <= shard.keys():
        lacking = ", ".join(sorted(leaves - shard.keys()))
        raise InconsistentError(f"the shard of expert {expert} lacks {lacking}", path=path)
    return shard


def of_another_size(expert: int, tensors: dict[str, TensorRef], shards: dict[int, str]) -> int | None:
    """Return the first other expert if the file size of its shard differs, or None.

    The shards of linear experts should all have the same size. If two sizes differ, the caller opens both to find
    different shapes. Experts with inner layers may differ in size; for them, the result is None.
    """
    other = next((i for i in shards if i != expert), None)
    if other is None or any("." in leaf for leaf in tensors):
        return None
    return other if os.stat(shards[other]).st_size != os.stat(shards[expert]).st_size else None  # noqa: PTH116


def check_fit(path: Path, expert: int, tensors: dict[str, TensorRef], other: int, model: dict[str, TensorRef]) -> None:
    """Raise InconsistentError if a shard's tensors do not fit `model`, the tensors of expert `other`.

    A trainer's loader would skip such a shard.
    """
    for leaf, what in unfit(tensors, model, (f"the shard of expert {expert}", f"the shard of expert {other}")):
        raise InconsistentError(what, path=path, key=leaf)


def tied_across_files(checkpoint: Checkpoint) -> set[str]:
    """Return the names of expert tensors that share memory with a tensor in another file."""
    if checkpoint.head is None or checkpoint.head.kind is HeadKind.SINGLE:
        return set()
    slots = checkpoint.optimizer.state if checkpoint.optimizer else {}
    router: list[tuple[tuple[int | None, str], TensorRef]] = [
        ((None, name), tensor) for name, tensor in named_references([checkpoint.core, checkpoint.payload, slots])
    ]
    # An expert that was not opened has a file of its own, so it shares no memory with other tensors.
    opened = [(i, expert) for i, expert in checkpoint.head.experts.items() if expert.is_open]
    experts = [
        ((i, checkpoint.head.prefix(i) + leaf), t) for i, expert in opened for leaf, t in expert.references().items()
    ]
    return {
        name
        for (((first, _), _), *others) in sharing([*router, *experts])
        for (owner, name), _ in others
        if owner != first
    }


def _compact(tensor: TensorRef) -> TensorRef:
    """Return a tensor that fills its storage, because torch.save writes whole storages."""
    if fills_storage(tensor):
        return tensor
    return tensor.copied()
