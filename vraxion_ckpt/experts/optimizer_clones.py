"""Give the parameters of a cloned expert their param groups and optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, ParamGroup
from vraxion_ckpt.checkpoint.references import TensorRef, reference
from vraxion_ckpt.errors import TransformError
from vraxion_ckpt.optimizer.parameter_order import has_unclear_groups, insert_groups, owns_groups
from vraxion_ckpt.optimizer.placement import BY_NAME_WITHOUT_STATE

StatePolicy = Literal["copy", "reset"]


def refuse_flat_state(optimizer: Optimizer) -> None:
    """Raise `TransformError` for state that covers all parameters of a group in one vector, as L-BFGS keeps it."""
    for group in optimizer.groups:
        held = [name for name in group.params if name in optimizer.state]
        slots = optimizer.state.reference(held[0]) if len(group.params) > 1 and len(held) == 1 else {}
        if "prev_flat_grad" in slots:  # a slot of torch.optim.LBFGS
            raise TransformError(
                "the optimizer keeps one state for all parameters (L-BFGS), which cannot be split by parameter",
                key=held[0],
                hint="drop it: --optimizer drop",
            )


def clone_in_optimizer(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    old: str,
    new: str,
    clones: Mapping[str, tuple[TensorRef, TensorRef]],
    policy: StatePolicy,
) -> None:
    """Add a clone's parameters to the param groups, and copy their state.

    Args:
        checkpoint: the checkpoint that contains parent and clone.
        optimizer: the checkpoint's optimizer, which is changed.
        old: prefix of the parent's parameter names.
        new: prefix of the clone's parameter names.
        clones: leaf name → (parent's tensor, clone's tensor). Empty if no noise was added to the clone.
        policy: ``copy`` copies the parent's state, ``reset`` leaves the clone without state.
    """
    own: list[ParamGroup] = []
    for one in optimizer.each_part():
        if has_unclear_groups(one, checkpoint) and not one.parts[0].is_by_name:
            raise TransformError(
                "each parameter of the head has its own param group, and the optimizer has no others: it is unknown "
                "whether those of a clone get groups of their own",
                key=str(one.parts[0]),
                hint="drop it: --optimizer drop",
            )
        if owns_groups(one, checkpoint):
            own += [
                replace(group, options=dict(group.options), params=[new + name[len(old) :] for name in group.params])
                for group in one.groups
                if group.params and all(name.startswith(old) for name in group.params)
            ]
            continue
        for group in one.groups:
            group.params += [new + name[len(old) :] for name in group.params if name.startswith(old)]
    insert_groups(optimizer, own, checkpoint)
    if policy == "reset":
        _refuse_by_name(optimizer, old, new)
    else:
        for name in [name for name in optimizer.state if name.startswith(old)]:
            leaf = name[len(old) :]
            slots = {slot: _unshared(value) for slot, value in optimizer.state.reference(name).items()}
            for slot, value in slots.items() if leaf in clones else ():
                if is_master_copy(value, slot, clones[leaf][0]):
                    slots[slot] = in_dtype(clones[leaf][1], value.dtype)
            optimizer.state[new + leaf] = slots


def _refuse_by_name(optimizer: Optimizer, old: str, new: str) -> None:
    """Raise `TransformError` if torch loads parent and clone by name and the parent has state."""
    for group in optimizer.groups:
        for name in group.params if optimizer.parts[group.part].is_by_name else ():
            if name.startswith(old) and name in optimizer.state:
                raise TransformError(BY_NAME_WITHOUT_STATE, key=new + name[len(old) :], hint="use optimizer=copy")


def in_dtype(tensor: TensorRef, dtype: str) -> TensorRef:
    """Return a copy of a tensor, converted to another dtype."""
    import torch

    return reference(tensor.read_only_tensor().detach().to(getattr(torch, dtype), copy=True))


def is_master_copy(value: Any, name: str, parameter: TensorRef) -> bool:
    """Return whether a value is a higher-precision copy of a parameter, which the optimizer rounds to the parameter.

    Args:
        value: value of a slot, or an entry of a companion.
        name: name of the slot, or empty.
        parameter: the parameter.
    """
    if not isinstance(value, TensorRef) or value.shape != parameter.shape or not value.is_floating_point():
        return False
    if name == "master_param":
        return True
    return value.itemsize > parameter.itemsize and same_bits(
        in_dtype(value, parameter.dtype), in_dtype(parameter, parameter.dtype)
    )


def _unshared(value: Any) -> Any:
    """Return a deep copy of a slot's value."""
    if isinstance(value, TensorRef):
        return value.copied()
    if isinstance(value, list | tuple):
        return type(value)(_unshared(item) for item in value)
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return value
