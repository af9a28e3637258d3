"""What transforms share: rename a head, clone an expert, remove one, with all that belongs to it.

An expert is more than its tensors: optimizer state and group membership, parameter names, module versions and a
lifecycle row go with it. These functions change a checkpoint that the caller owns (a `Checkpoint.copy`) and
never write into a tensor. They note which tensor of the head comes from which (`Checkpoint.ancestors`); the order of
the optimizer's parameters, and averages of the model, follow from that when the step is done.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from vraxion_ckpt.checkpoint.buffers import torch_buffers
from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
from vraxion_ckpt.checkpoint.head_names import split_name
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer
from vraxion_ckpt.checkpoint.plain_data import bytes_of, dtype_name, in_pieces
from vraxion_ckpt.checkpoint.provenance import Ancestor
from vraxion_ckpt.checkpoint.shared_memory import sharing
from vraxion_ckpt.errors import CkptWarning, TransformError
from vraxion_ckpt.optimizer.parameter_order import owns_groups, run_of_groups
from vraxion_ckpt.wording import listed

StatePolicy = Literal["copy", "reset"]

_V = TypeVar("_V")

_PIECE = 2**20  # elements that noise is drawn for at once; part of what a seed means


def rename_head(checkpoint: Checkpoint, kind: HeadKind) -> None:
    """Make the head's only expert, id 0, a module of the other kind; every name follows, in place in its order."""
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
    """Add expert `child`, a copy of `parent`, after the last expert; it shares no storage with it.

    Args:
        checkpoint: changed; its head is of kind EXPERTS.
        parent: an expert that has tensors.
        child: the next free id.
        noise: standard deviation of Gaussian noise on the child's floating-point parameters, not on buffers; 0 copies
            bit by bit.
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
    for name, other in _ties(checkpoint, old):
        # A clone has storages of its own, so it could not be tied as its parent is.
        raise TransformError(f"is tied to {other}; a clone would come untied", key=name)
    buffers = buffers_of(checkpoint, parent) if noise else set()
    added = ((noise, f"{seed}:{new}"),) if noise else ()
    copies = {leaf: copy_of(t, () if leaf in buffers else added, leaf) for leaf, t in tensors.items()}
    head.experts[child] = Expert(copies)
    _note(checkpoint, new, old, added)
    _say_where_noise_is_lost(
        {leaf: (tensors[leaf], copies[leaf]) for leaf in tensors if leaf not in buffers}, noise, new
    )
    if checkpoint.optimizer is not None:
        _refuse_flat_state(checkpoint.optimizer)
        clones = {leaf: (tensors[leaf], copies[leaf]) for leaf in tensors}
        _clone_in_optimizer(checkpoint, checkpoint.optimizer, old, new, clones if noise else {}, optimizer)
    if checkpoint.param_names is not None:
        checkpoint.param_names = tuple(_insert_clones(list(checkpoint.param_names), head, old, new))
    if checkpoint.metadata is not None:
        checkpoint.metadata = _clone_modules(checkpoint.metadata, head.prefix(last), old, new)
    like = checkpoint.lifecycle.get(parent)
    checkpoint.lifecycle[child] = Lifecycle.fresh(checkpoint.step, like)


def remove_expert(checkpoint: Checkpoint, expert: int, into: int) -> None:
    """Remove an expert and give its addresses to another; ids above it move down by one, wherever they stand.

    Args:
        checkpoint: changed; its head is of kind EXPERTS.
        expert: one that has tensors, or a garbage-collected one.
        into: another expert, by its id before the removal.

    Raises:
        TransformError: one of the expert's tensors is tied to a tensor that stays.
    """
    head = _head(checkpoint)
    gone = head.prefix(expert)
    for name, other in _ties(checkpoint, gone):
        if not other.startswith(gone):
            # An optimizer lists tied parameters by their first name alone; state under it would be lost to the other.
            raise TransformError(f"is tied to {other}, which stays and may lose its optimizer state", key=name)
    if checkpoint.optimizer is not None:
        _refuse_flat_state(checkpoint.optimizer)
    _drop_stale_plans(checkpoint, expert, into)
    ids = {i: i - (i > expert) for i in {*head.experts, *head.deleted} - {expert}}
    _rename(checkpoint, {gone: None} | {head.prefix(old): head.prefix(new) for old, new in ids.items()})
    checkpoint.head = replace(
        head,
        experts={ids[i]: tensors for i, tensors in head.experts.items() if i in ids},
        deleted=frozenset(ids[i] for i in head.deleted if i in ids),
    )
    checkpoint.lifecycle = {ids[i]: row for i, row in checkpoint.lifecycle.items() if i in ids}
    router = checkpoint.router_map
    if router is not None:
        owners = router.to(torch.int64, copy=True)  # not every integer type can be indexed
        owners[owners == expert] = into
        owners[owners > expert] -= 1
        checkpoint.router_map = owners.to(router.dtype)


def _head(checkpoint: Checkpoint) -> Head:
    if checkpoint.head is None:
        raise ValueError("the checkpoint has no head")
    return checkpoint.head


def _ties(checkpoint: Checkpoint, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield an expert's tensors that share memory with another, its own or not, each with that one's name."""
    for (first, _), *others in sharing(checkpoint.open_tensors().items()):
        for name, _ in others:
            if name.startswith(prefix):
                yield name, first
            elif first.startswith(prefix):
                yield first, name


def _rename(checkpoint: Checkpoint, prefixes: Mapping[str, str | None]) -> None:
    """Give what stands under a prefix another one, in place in its order, or take it out where that is None.

    Optimizer, parameter names and module versions follow; the tensors themselves are the caller's.
    """

    def renamed(name: str) -> str | None:
        # Whole prefixes are looked up, so expert 1's cannot be taken for the beginning of expert 10's.
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
        # A group of an expert alone goes with it; an empty one that was there before stays.
        held = [bool(group.params) for group in checkpoint.optimizer.groups]
        own = owns_groups(checkpoint.optimizer, checkpoint)
        for group in checkpoint.optimizer.groups:
            group.params = [new for name in group.params if (new := renamed(name)) is not None]
        if own:
            groups = zip(checkpoint.optimizer.groups, held, strict=True)
            checkpoint.optimizer.groups = [group for group, had_some in groups if group.params or not had_some]
        checkpoint.optimizer.state = renamed_keys(checkpoint.optimizer.state)
    if checkpoint.param_names is not None:
        checkpoint.param_names = tuple(new for name in checkpoint.param_names if (new := renamed(name)) is not None)
    if checkpoint.metadata is not None:
        # Its keys are the paths of modules, a prefix without the closing dot.
        modules = renamed_keys({f"{module}.": value for module, value in checkpoint.metadata.items()})
        checkpoint.metadata = {module.removesuffix("."): value for module, value in modules.items()}


def _with_list_of_experts(metadata: dict[str, Any], head: Head) -> dict[str, Any]:
    """Give a state dict's ``_metadata`` the entry of the module that lists the experts, or take it from a single head.

    With it goes what a single head does not have: entries of experts that are no more.
    """
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
    """Forget which split was planned, and what a trainer asks for where it means an expert that is not as it was."""
    checkpoint.plan = None
    request = checkpoint.payload.get("mitosis")
    parent = request.get("parent_expert") if isinstance(request, Mapping) else None
    if isinstance(parent, int) and (parent >= expert or parent == into):
        del checkpoint.payload["mitosis"]
        message = (
            f"the trainer's `mitosis` request to split expert {parent} no longer fits and is dropped; "
            "to have it carried out, split before you remove"
        )
        warnings.warn(message, CkptWarning, stacklevel=3)


def _note(checkpoint: Checkpoint, new: str, old: str, noise: tuple[tuple[float, str], ...]) -> None:
    """Note that what stands under one prefix was made of what stands under another, perhaps in the same step."""
    source = checkpoint.ancestors.get(old, Ancestor(old))
    checkpoint.ancestors[new] = Ancestor(source.prefix, source.noise + noise)


def buffers_of(checkpoint: Checkpoint, expert: int) -> set[str]:
    """Return the leaves of an expert that are buffers: by torch's own names, or since no optimizer lists them.

    What a bound optimizer lists of no expert, although it lists other leaves of experts, is no parameter.
    """
    head = _head(checkpoint)
    leaves = set(head.experts[expert])
    buffers = torch_buffers(leaves)
    listed = checkpoint.optimizer.params if checkpoint.optimizer else []
    trained = {found[1] for name in listed if (found := split_name(name, head.names))}
    return buffers | (leaves - trained if trained else set())


def copy_of(tensor: Tensor, noise: tuple[tuple[float, str], ...], leaf: str) -> Tensor:
    """Return a copy of its own, with Gaussian noise if it is of a floating-point type.

    Args:
        tensor: any tensor.
        noise: standard deviations, each with what its generator is seeded with before the leaf's name.
        leaf: the name of the tensor in its expert.
    """
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    for deviation, seed in noise if copy.is_floating_point() else ():
        noisy = copy.contiguous()
        _add_noise(noisy.view(-1), deviation, seed + leaf)
        if noisy is not copy:
            copy.copy_(noisy)
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _say_where_noise_is_lost(pairs: Mapping[str, tuple[Tensor, Tensor]], noise: float, new: str) -> None:
    """Warn of parameters that noise has left as they were: of another type, or of too few digits."""
    lost = []
    for leaf, (old, copy) in pairs.items() if noise else ():
        numbers = copy.numel()
        if copy.dtype == torch.bool:  # a mask, which no noise was meant for
            continue
        if numbers and not copy.is_floating_point():
            lost.append(f"{leaf} is {dtype_name(copy.dtype)}")
        elif numbers:
            changed = _count_changed(old, copy)
            if 2 * changed < numbers:
                lost.append(f"{leaf} ({dtype_name(copy.dtype)}) has {changed} of {numbers} elements changed")
    if lost:
        message = (
            f"noise of {noise:g} changes little or nothing in {new.removesuffix('.')}: {listed(lost, 3, '; ')}"
            "; there the clone is a copy of its parent"
        )
        warnings.warn(message, CkptWarning, stacklevel=4)


def _count_changed(old: Tensor, new: Tensor) -> int:
    """Count the elements whose bits differ, a piece at a time: temporaries stay small however large the tensors are."""
    size = old.itemsize
    pieces = in_pieces(bytes_of(old), bytes_of(new), size=_PIECE * size)
    return sum(int((a.view(-1, size) != b.view(-1, size)).any(1).sum()) for a, b in pieces)


def _add_noise(flat: Tensor, noise: float, seed: str) -> None:
    """Add Gaussian noise to a tensor of our own, a piece at a time: temporaries stay small however large it is."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) >> 1)
    # Narrow types cannot be drawn or added in directly; in at least single precision the sum rounds once.
    wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
    for (piece,) in in_pieces(flat, size=_PIECE):
        drawn = torch.randn(piece.shape, generator=generator, dtype=wide)
        piece.copy_((piece.to(wide) + noise * drawn).to(flat.dtype))


def _refuse_flat_state(optimizer: Optimizer) -> None:
    """Refuse state that spans the parameters of a group, as L-BFGS keeps it: it cannot be cut."""
    for group in optimizer.groups:
        held = [name for name in group.params if name in optimizer.state]
        slots = optimizer.state[held[0]] if len(group.params) > 1 and len(held) == 1 else {}
        if "prev_flat_grad" in slots:  # as torch.optim.LBFGS calls it, one vector over all parameters
            raise TransformError(
                "the optimizer keeps one state for all parameters (L-BFGS), which cannot follow a change of them",
                key=held[0],
                hint="leave it behind: --optimizer drop",
            )


def _clone_in_optimizer(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    old: str,
    new: str,
    clones: Mapping[str, tuple[Tensor, Tensor]],
    policy: StatePolicy,
) -> None:
    """Give the clone's parameters a place in the param groups, and their state.

    Args:
        checkpoint: tells which experts there are.
        optimizer: changed.
        old: the parent's prefix.
        new: the clone's.
        clones: the parent's tensors and the clone's by leaf, where they differ.
        policy: whether the state is copied.
    """
    if owns_groups(optimizer, checkpoint):
        own = [
            replace(group, options=dict(group.options), params=[new + name[len(old) :] for name in group.params])
            for group in optimizer.groups
            if group.params and all(name.startswith(old) for name in group.params)
        ]
        run = run_of_groups(optimizer, checkpoint)
        at = run[1] if run else len(optimizer.groups)
        optimizer.groups[at:at] = own
    else:
        for group in optimizer.groups:
            group.params += [new + name[len(old) :] for name in group.params if name.startswith(old)]
    if policy == "copy":
        for name in [name for name in optimizer.state if name.startswith(old)]:
            leaf = name[len(old) :]
            slots = {slot: _unshared(value) for slot, value in optimizer.state[name].items()}
            for slot, value in slots.items() if leaf in clones else ():
                if is_master_copy(value, slot, clones[leaf][0]):
                    slots[slot] = clones[leaf][1].detach().to(value.dtype, copy=True)
            optimizer.state[new + leaf] = slots


def is_master_copy(value: Any, name: str, parameter: Tensor) -> bool:
    """Tell whether a value is a copy of a parameter of a wider type, from which an optimizer computes it."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.is_floating_point():
        return False
    if name == "master_param":
        return True
    return value.itemsize > parameter.itemsize and same_bits(
        value.detach().to(parameter.dtype), parameter.detach().clone()
    )


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


def _clone_modules(metadata: dict[str, Any], last: str, old: str, new: str) -> dict[str, Any]:
    clones = {
        (new + f"{module}."[len(old) :]).removesuffix("."): dict(value)
        for module, value in metadata.items()
        if f"{module}.".startswith(old)
    }
    return _insert_after(metadata, lambda module: f"{module}.".startswith(last), clones)
