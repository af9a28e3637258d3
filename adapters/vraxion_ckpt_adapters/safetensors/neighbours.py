"""Tell the files of a Hugging Face folder apart: weights, files that belong to them, and others."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from vraxion_ckpt.plugin_api import Neighbour, StaleAfter

_CONFIG = "config.json"
# What `transformers.Trainer` saves to resume training, also with DeepSpeed and FSDP.
_OPTIMIZER = re.compile(r"optimizer\.(pt|bin)|optimizer_\d+|optim_sharded|global_step\d+")
_PROGRESS = re.compile(r"scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|trainer_state\.json|latest|zero_to_fp32\.py")
_ARGUMENTS = re.compile(r"training_args\.bin")
# Folders with the same weights once more: FSDP's, and the slices from which torch has put the weights together.
_WEIGHTS_FOLDER = re.compile(r"pytorch_model(_fsdp)?_\d+|sharded")
_WEIGHTS = re.compile(
    r".*\.(safetensors|safetensors\.index\.json|pt|pth|ckpt|bin|bin\.index\.json|h5|msgpack|onnx|gguf|distcp|npz)"
)


def sort_entries(folder: Path, own: Collection[str]) -> tuple[list[Neighbour], list[Path]]:
    """Divide the entries of a folder, without the weights, into neighbours and foreign files.

    Foreign are hidden entries, such as ``.git`` and ``.cache``; folders with weights of their own, such as
    ``checkpoint-500`` or ``onnx``; and links and pipes that are no files.

    Args:
        folder: the folder.
        own: the names of the files with the weights, and of their index.

    Returns:
        the neighbours by name, and the paths of the others.
    """
    files: dict[str, str] = {}  # by relative path, the name of the entry of `folder`
    foreign: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.name in own and entry.is_file():
            continue
        found = [] if entry.name.startswith(".") else _files_of(entry)
        if not found or (entry.is_dir() and not _is_known(entry.name) and any(map(_may_hold_weights, found))):
            foreign.append(entry)
        else:
            files |= {file.relative_to(folder).as_posix(): entry.name for file in found}
    resumes = any(map(_OPTIMIZER.fullmatch, files.values()))
    return [_neighbour(name, entry, resumes=resumes) for name, entry in files.items()], foreign


def _files_of(entry: Path) -> list[Path]:
    """Return a file, or the files in a folder. Empty if there are entries of other kinds."""
    if entry.is_file():
        return [entry]
    if not entry.is_dir() or entry.is_symlink():
        return []
    inside = sorted(entry.rglob("*"))
    plain = all(path.is_file() or (path.is_dir() and not path.is_symlink()) for path in inside)
    return [path for path in inside if path.is_file()] if plain else []


def _is_known(name: str) -> bool:
    return bool(_OPTIMIZER.fullmatch(name) or _WEIGHTS_FOLDER.fullmatch(name))


def _may_hold_weights(file: Path) -> bool:
    return bool(_WEIGHTS.fullmatch(file.name))


def _neighbour(name: str, entry: str, *, resumes: bool) -> Neighbour:
    """Describe a file by its name and by the name of the folder's entry that it is or that contains it.

    Args:
        name: its relative path.
        entry: the first part of the path.
        resumes: whether there is an optimizer. Without one, the rest of the training state fits any model.
    """
    if entry == _CONFIG:
        return Neighbour(name, stale_after=StaleAfter.NEW_STRUCTURE)
    if _OPTIMIZER.fullmatch(entry):
        return Neighbour(name, "the optimizer", StaleAfter.NEW_VALUES)
    if _PROGRESS.fullmatch(entry):
        # Without the optimizer, a Trainer would resume here with a fresh one and would not say so.
        return Neighbour(name, "training state", StaleAfter.NEW_VALUES if resumes else StaleAfter.NOTHING)
    if _ARGUMENTS.fullmatch(entry):
        return Neighbour(name, "training state")
    if _WEIGHTS_FOLDER.fullmatch(entry) or _WEIGHTS.fullmatch(entry):
        return Neighbour(name, "weights", StaleAfter.NEW_VALUES)
    return Neighbour(name)
