"""Rename a head, clone an expert, or remove an expert.

An expert has tensors, optimizer state, param groups, parameter names, module versions and a lifecycle row. These
functions change a checkpoint that the caller owns (a `Checkpoint.copy`), and never write a tensor in place. They
record the source of every tensor of the head in `Checkpoint.ancestors`. After the step, the order of the optimizer's
parameters and the averages of the model are updated from these records.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from vraxion_ckpt.checkpoint.buffers import torch_buffers
from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
from vraxion_ckpt.checkpoint.head_names import split_name
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle
from vraxion_ckpt.checkpoint.provenance import Ancestor
from vraxion_ckpt.checkpoint.shared_memory import sharing
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.errors import CkptWarning, TransformError
from vraxion_ckpt.experts.noise import copy_of, warn_of_lost_noise
from vraxion_ckpt.experts.optimizer_clones import StatePolicy, clone_in_optimizer, refuse_flat_state
from vraxion_ckpt.optimizer.parameter_order import owns_groups

_V = TypeVar("_V")


def rename_head(checkpoint: Checkpoint, kind: HeadKind) -> None:
    """Change the kind of a head with one expert, id 0. All names of the head change and keep their positions.

    Args:
        checkpoint: the checkpoint, which is changed.
        kind: the new kind.

    Raises:
        ValueError: the checkpoint has no head.
    """
    head = _head(checkpoint)
    checkpoint.head = replace(head, kind=kind)
    _rename(checkpoint, {head.prefix(0): checkpoint.head.prefix(0)})
    if checkpoint.metadata is not None:
        checkpoint.metadata = _with_list_of_experts(checkpoint.metadata, checkpoint.head)


def clone_expert(
    checkpoint: Checkpoint,
    parent: int,
    child: int,
    *,
    noise: float,
    seed: int,
    optimizer: StatePolicy,
) -> None:
    """Add expert `child`, a copy of `parent` with its own storage, after the last expert.

    Args:
        checkpoint: the checkpoint, which is changed. Its head has kind EXPERTS.
        parent: an expert with tensors.
        child: the next free id.
        noise: standard deviation of Gaussian noise added to the child's floating-point parameters, but not to buffers.
            0 makes a bit-identical copy.
        seed: seed of the noise. The generator of each tensor is seeded with the seed and the child's tensor name only.
        optimizer: ``copy`` copies every slot. ``reset`` leaves the child's parameters without state, like new ones.
            Moments and ``step`` are treated alike, because moments with a wrong step count make the first update
            several times too large or too small.

    Raises:
        TransformError: a tensor of the parent is tied to another tensor, or the optimizer keeps one state for all
            parameters (L-BFGS).
        ValueError: the checkpoint has no head.
    """
    head = _head(checkpoint)
    last = max((*head.experts, *head.deleted))
    old, new = head.prefix(parent), head.prefix(child)
    tensors = head.experts[parent].references()
    for name, other in _ties(checkpoint, old):
        raise TransformError(f"is tied to {other}, but a clone would not be", key=name)
    if checkpoint.optimizer is not None:
        refuse_flat_state(checkpoint.optimizer)
    buffers = buffers_of(checkpoint, parent) if noise else set()
    added = ((noise, f"{seed}:{new}"),) if noise else ()
    copies = {leaf: copy_of(t, () if leaf in buffers else added, leaf) for leaf, t in tensors.items()}
    head.experts[child] = Expert(copies)
    source = checkpoint.ancestors.get(old, Ancestor(old))  # the parent may be new in the same step
    checkpoint.ancestors[new] = Ancestor(source.prefix, source.noise + added)
    pairs = {leaf: (tensors[leaf], copies[leaf]) for leaf in tensors} if noise else {}
    warn_of_lost_noise({leaf: pair for leaf, pair in pairs.items() if leaf not in buffers}, noise, new)
    if checkpoint.optimizer is not None:
        clone_in_optimizer(checkpoint, checkpoint.optimizer, old, new, pairs, optimizer)
    if checkpoint.param_names is not None:
        checkpoint.param_names = tuple(_insert_clones(list(checkpoint.param_names), head, old, new))
    if checkpoint.metadata is not None:
        checkpoint.metadata = _clone_modules(checkpoint.metadata, head.prefix(last), old, new)
    like = checkpoint.lifecycle.get(parent)
    checkpoint.lifecycle[child] = Lifecycle.fresh(checkpoint.step, like)


def remove_expert(checkpoint: Checkpoint, expert: int, into: int) -> None:
    """Remove an expert and give its addresses to another. Decrement all higher expert ids.

    Args:
        checkpoint: the checkpoint, which is changed. Its head has kind EXPERTS.
        expert: id of the expert to remove. It may be garbage-collected.
        into: id, before the removal, of the expert that gets the addresses.

    Raises:
        TransformError: a tensor of the expert is tied to a remaining tensor, or the optimizer keeps one state for all
            parameters (L-BFGS).
        ValueError: the checkpoint has no head.
    """
    head = _head(checkpoint)
    gone = head.prefix(expert)
    for name, other in _ties(checkpoint, gone):
        if not other.startswith(gone):
            # An optimizer lists tied parameters under their first name, so the remaining tensor may lose its state.
            raise TransformError(f"is tied to {other}, which is kept and may lose its optimizer state", key=name)
    if checkpoint.optimizer is not None:
        refuse_flat_state(checkpoint.optimizer)
    _drop_stale_plans(checkpoint, expert, into)
    ids = {i: i - (i > expert) for i in {*head.experts, *head.deleted} - {expert}}
    _rename(checkpoint, {gone: None} | {head.prefix(old): head.prefix(new) for old, new in ids.items()})
    checkpoint.head = replace(
        head,
        experts={ids[i]: tensors for i, tensors in head.experts.items() if i in ids},
        deleted=frozenset(ids[i] for i in head.deleted if i in ids),
    )
    checkpoint.lifecycle = {ids[i]: row for i, row in checkpoint.lifecycle.items() if i in ids}
    router = checkpoint.router_reference
    if router is not None:
        import torch

        owners = router.read_only_tensor().to(torch.int64, copy=True)  # some integer dtypes do not support masks
        owners[owners == expert] = into
        owners[owners > expert] -= 1
        checkpoint.router_map = owners.to(getattr(torch, router.dtype))


def _head(checkpoint: Checkpoint) -> Head:
    if checkpoint.head is None:
        raise ValueError("the checkpoint has no head")
    return checkpoint.head


def _ties(checkpoint: Checkpoint, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield each tensor of an expert that shares memory with another tensor, with the name of the other."""
    for (first, _), *others in sharing(checkpoint.open_references().items()):
        for name, _ in others:
            if name.startswith(prefix):
                yield name, first
            elif first.startswith(prefix):
                yield first, name


def _rename(checkpoint: Checkpoint, prefixes: Mapping[str, str | None]) -> None:
    """Replace prefixes of names in optimizer, parameter names and module versions. Positions stay the same.

    The head's tensors are not renamed here.

    Args:
        checkpoint: the checkpoint, which is changed.
        prefixes: new prefix by old prefix. None removes the names.
    """

    def renamed(name: str) -> str | None:
        # Prefixes end with a dot, so the prefix of expert 1 does not match names of expert 10.
        for end, char in enumerate(name, start=1):
            if char == "." and name[:end] in prefixes:
                new = prefixes[name[:end]]
                return None if new is None else new + name[end:]
        return name

    def renamed_keys(entries: Mapping[str, _V]) -> dict[str, _V]:
        return {new: value for old, value in entries.items() if (new := renamed(old)) is not None}

    sources = {old: checkpoint.ancestors.pop(old, Ancestor(old)) for old in prefixes}
    for old, new in prefixes.items():
        if new is not None and sources[old] != Ancestor(new):
            checkpoint.ancestors[new] = sources[old]
    if checkpoint.optimizer is not None:
        # If experts have their own groups, remove groups that become empty. Groups that were empty before stay.
        groups = []
        for one in checkpoint.optimizer.each_part():
            own = owns_groups(one, checkpoint)
            for group in one.groups:
                had_some = bool(group.params)
                group.params = [new for name in group.params if (new := renamed(name)) is not None]
                if group.params or not own or not had_some:
                    groups.append(group)
        checkpoint.optimizer.groups = groups
        checkpoint.optimizer.state = TensorDict(renamed_keys(checkpoint.optimizer.state.references()))
    if checkpoint.param_names is not None:
        checkpoint.param_names = tuple(new for name in checkpoint.param_names if (new := renamed(name)) is not None)
    if checkpoint.metadata is not None:
        # Keys are module paths: prefixes without the last dot.
        modules = renamed_keys({f"{module}.": value for module, value in checkpoint.metadata.items()})
        checkpoint.metadata = {module.removesuffix("."): value for module, value in modules.items()}


def _with_list_of_experts(metadata: dict[str, Any], head: Head) -> dict[str, Any]:
    """Return ``_metadata`` with an entry for the list of experts, or without its entries for a single head."""
    container = head.names.experts.removesuffix(".")
    listed: dict[str, Any] = {}
    for module, value in metadata.items():
        if not f"{module}.".startswith(head.names.experts):
            listed[module] = value
        elif head.kind is HeadKind.EXPERTS and module != container:
            listed.setdefault(container, {"version": 1})
            listed[module] = value
    return listed


def _drop_stale_plans(checkpoint: Checkpoint, expert: int, into: int) -> None:
    """Remove the split plan, and a trainer's split request for an expert that is renumbered or gets addresses."""
    checkpoint.plan = None
    request = checkpoint.payload.get("mitosis")
    parent = request.get("parent_expert") if isinstance(request, Mapping) else None
    if isinstance(parent, int) and (parent >= expert or parent == into):
        del checkpoint.payload["mitosis"]
        message = (
            f"the trainer's `mitosis` request to split expert {parent} no longer fits and is dropped; "
            "to carry it out, split before you remove experts"
        )
        warnings.warn(message, CkptWarning, stacklevel=3)


def buffers_of(checkpoint: Checkpoint, expert: int) -> set[str]:
    """Return the leaf names of an expert's buffers.

    A leaf is a buffer if torch's own modules use its name for one (`torch_buffers`), or if the optimizer lists leaves
    of experts, but not this one.

    Raises:
        ValueError: the checkpoint has no head.
    """
    head = _head(checkpoint)
    leaves = set(head.experts[expert])
    buffers = torch_buffers(leaves)
    listed = checkpoint.optimizer.params if checkpoint.optimizer else []
    trained = {found[1] for name in listed if (found := split_name(name, head.names))}
    return buffers | (leaves - trained if trained else set())


def _insert_clones(names: list[str], head: Head, old: str, new: str) -> list[str]:
    """Insert the child's names, in the parent's leaf order, after those of the last expert."""
    clones = [new + name[len(old) :] for name in names if name.startswith(old)]
    inserted = _insert_after(dict.fromkeys(names), lambda n: n.startswith(head.names.experts), dict.fromkeys(clones))
    return list(inserted)


def _insert_after(entries: dict[str, _V], belongs: Callable[[str], bool], new: dict[str, _V]) -> dict[str, _V]:
    """Return `entries` with `new` inserted after the last entry for which `belongs` is true, or at the end."""
    items = list(entries.items())
    end = max((i + 1 for i, (name, _) in enumerate(items) if belongs(name)), default=len(items))
    return dict([*items[:end], *new.items(), *items[end:]])


def _clone_modules(metadata: dict[str, Any], last: str, old: str, new: str) -> dict[str, Any]:
    clones = {
        (new + f"{module}."[len(old) :]).removesuffix("."): dict(value)
        for module, value in metadata.items()
        if f"{module}.".startswith(old)
    }
    return _insert_after(metadata, lambda module: f"{module}.".startswith(last), clones)
