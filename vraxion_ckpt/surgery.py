"""What transforms share: rename a head, clone an expert, with all that belongs to it.

An expert is more than its tensors: optimizer state and group membership, parameter names, module versions and a
lifecycle row go with it. These functions change a checkpoint that the caller owns (a `Checkpoint.copy`) and
never write into a tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from vraxion_ckpt.errors import TransformError
from vraxion_ckpt.model import Checkpoint, Expert, Head, HeadKind, Lifecycle, Optimizer

OptimizerPolicy = Literal["copy", "reset"]

_V = TypeVar("_V")

_PIECE = 2**20  # elements that noise is drawn for at once; part of what a seed means


def rename_head(checkpoint: Checkpoint, kind: HeadKind) -> None:
    """Make the head's only expert, id 0, a module of the other kind; every name follows, in place in its order."""
    head = _head(checkpoint)
    old, checkpoint.head = head.prefix(0), replace(head, kind=kind)
    new = checkpoint.head.prefix(0)

    def renamed(name: str) -> str:
        return new + name[len(old) :] if name.startswith(old) else name

    if checkpoint.optimizer is not None:
        optimizer = checkpoint.optimizer
        for group in optimizer.groups:
            group.params = [renamed(name) for name in group.params]
        optimizer.state = {renamed(name): slots for name, slots in optimizer.state.items()}
    if checkpoint.param_names is not None:
        checkpoint.param_names = tuple(renamed(name) for name in checkpoint.param_names)
    if checkpoint.metadata is not None:
        checkpoint.metadata = _rename_modules(checkpoint.metadata, old, new, head)


def clone_expert(
    checkpoint: Checkpoint,
    parent: int,
    child: int,
    *,
    noise: float,
    seed: int,
    optimizer: OptimizerPolicy,
) -> None:
    """Add expert `child`, a copy of `parent`, after the last expert; it shares no storage with it.

    Args:
        checkpoint: changed; its head is of kind EXPERTS.
        parent: an expert that has tensors.
        child: the next free id.
        noise: standard deviation of Gaussian noise on the child's floating-point tensors; 0 copies bit by bit.
        seed: each tensor's noise is drawn from a generator seeded with (seed, the child's tensor name), so it
            depends on nothing else.
        optimizer: ``copy`` every slot, or ``reset``: the child's parameters have no state, as if they had never
            seen a gradient. Moments and ``step`` are chosen together: moments without the step count that
            goes with them make the first update several times too large or too small.

    Raises:
        TransformError: one of the parent's tensors is tied to another tensor.
    """
    head = _head(checkpoint)
    last = max((*head.experts, *head.deleted))
    old, new = head.prefix(parent), head.prefix(child)
    tensors = head.experts[parent].tensors
    _refuse_tied(checkpoint, old)
    head.experts[child] = Expert(
        {leaf: _copy_with_noise(tensor, noise, f"{seed}:{new}{leaf}") for leaf, tensor in tensors.items()}
    )
    if checkpoint.optimizer is not None:
        _clone_in_optimizer(checkpoint.optimizer, head, old, new, optimizer)
    if checkpoint.param_names is not None:
        checkpoint.param_names = tuple(_insert_clones(list(checkpoint.param_names), head, old, new))
    if checkpoint.metadata is not None:
        checkpoint.metadata = _clone_modules(checkpoint.metadata, head.prefix(last), old, new)
    like = checkpoint.lifecycle.get(parent)
    checkpoint.lifecycle[child] = Lifecycle.fresh(checkpoint.step, like)


def _head(checkpoint: Checkpoint) -> Head:
    if checkpoint.head is None:
        raise ValueError("the checkpoint has no head")
    return checkpoint.head


def _refuse_tied(checkpoint: Checkpoint, prefix: str) -> None:
    """A clone has storages of its own, so it could not be tied as its parent is; nor has a tied name own state."""
    places: dict[int, str] = {}
    for name, tensor in checkpoint.open_tensors().items():
        other = places.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if other != name and (name.startswith(prefix) or other.startswith(prefix)):
            raise TransformError(f"is tied to {other}; a clone would come untied", key=name)


def _copy_with_noise(tensor: Tensor, noise: float, seed: str) -> Tensor:
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    if noise and copy.is_floating_point():
        noisy = copy.contiguous()
        _add_noise(noisy.view(-1), noise, seed)
        if noisy is not copy:
            copy.copy_(noisy)
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _add_noise(flat: Tensor, noise: float, seed: str) -> None:
    """Add Gaussian noise to a tensor of our own, a piece at a time: temporaries stay small however large it is."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) >> 1)
    # Narrow types cannot be drawn or added in directly; in at least single precision the sum rounds once.
    wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE]
        drawn = torch.randn(piece.shape, generator=generator, dtype=wide)
        piece.copy_((piece.to(wide) + noise * drawn).to(flat.dtype))


def _clone_in_optimizer(optimizer: Optimizer, head: Head, old: str, new: str, policy: OptimizerPolicy) -> None:
    for group in optimizer.groups:
        group.params = _insert_clones(group.params, head, old, new)
    if policy == "copy":
        clones = {
            new + name[len(old) :]: {slot: _unshared(value) for slot, value in slots.items()}
            for name, slots in optimizer.state.items()
            if name.startswith(old)
        }
        optimizer.state = _insert_after(optimizer.state, lambda n: n.startswith(head.names.experts), clones)


def _insert_clones(names: list[str], head: Head, old: str, new: str) -> list[str]:
    """Put the child's names, in the parent's leaf order, right after the last expert's in this list."""
    clones = [new + name[len(old) :] for name in names if name.startswith(old)]
    inserted = _insert_after(dict.fromkeys(names), lambda n: n.startswith(head.names.experts), dict.fromkeys(clones))
    return list(inserted)


def _insert_after(entries: dict[str, _V], belongs: Callable[[str], bool], new: dict[str, _V]) -> dict[str, _V]:
    """Return `entries` with `new` right after the last entry that belongs (at the end if none does)."""
    items = list(entries.items())
    end = max((i + 1 for i, (name, _) in enumerate(items) if belongs(name)), default=len(items))
    return dict([*items[:end], *new.items(), *items[end:]])


def _unshared(value: Any) -> Any:
    """Copy a slot's value so that it shares no storage with the original."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    if isinstance(value, list | tuple):
        return type(value)(_unshared(item) for item in value)
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return value


def _rename_modules(metadata: dict[str, Any], old: str, new: str, head: Head) -> dict[str, Any]:
    """Rename the single head's module, and its submodules, in a state dict's ``_metadata``.

    Keys are module paths without the closing dot. The list of experts is a module of its own with an entry.
    """
    renamed: dict[str, Any] = {}
    container = head.names.experts.removesuffix(".")
    for module, value in metadata.items():
        if f"{module}.".startswith(old):
            if new.startswith(head.names.experts):
                renamed.setdefault(container, {"version": 1})
            renamed[(new + f"{module}."[len(old) :]).removesuffix(".")] = value
        elif module != container:
            renamed[module] = value
    return renamed


def _clone_modules(metadata: dict[str, Any], last: str, old: str, new: str) -> dict[str, Any]:
    clones = {
        (new + f"{module}."[len(old) :]).removesuffix("."): dict(value)
        for module, value in metadata.items()
        if f"{module}.".startswith(old)
    }
    return _insert_after(metadata, lambda module: f"{module}.".startswith(last), clones)
