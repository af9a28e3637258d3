"""Sample checkpoints: `make` builds one, `samples` returns one for each case that matters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle, SplitPlan
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, ParamGroup
from vraxion_ckpt.experts.surgery import rename_head
from vraxion_ckpt.testing.strategies import DTYPES, arbitrary_tensor

RING = 12
_WIDTH, _CLASSES = 6, 4


def make(
    *,
    experts: int = 3,
    widths: Sequence[int] = (),
    position: int | None = None,
    groups: int = 1,
    optimizer: bool = True,
    seed: int = 0,
) -> Checkpoint:
    """Make a small checkpoint like VRAXION's: body, ring of `RING` addresses, head, and Adam's state.

    Args:
        experts: number of experts; 0 for no head, 1 for a single head.
        widths: hidden width of each expert; if empty, the experts have no inner layer.
        position: number of core tensors before the head. If None, the head is last.
        groups: number of param groups: 1, or 2 (the weights, and everything else).
        optimizer: whether to add an optimizer. It has no state for the parameter ``unused``.
        seed: seed of the tensors' values.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    core = {
        "theta": randn(7),
        "router_map": torch.arange(RING) % max(1, experts),
        "bin_edges": torch.linspace(0, 1, 9),
        "body.weight": randn(_WIDTH, 5),
        "body.bias": randn(_WIDTH),
        "unused": randn(3),
    }
    head = None
    if experts:
        kind = HeadKind.SINGLE if experts == 1 else HeadKind.EXPERTS
        tensors = [_layers(randn, width) for width in widths] or [_linear(randn) for _ in range(experts)]
        head = Head(kind, dict(enumerate(map(Expert, tensors))), len(core) if position is None else position)
    checkpoint = Checkpoint(
        core=core,
        head=head,
        payload={"scaler": None, "step": 4, "losses": [2.5, 1.25]},
        lifecycle={i: Lifecycle(0.5 * i, created_step=0, last_used_step=4) for i in range(experts)},
        metadata={"": {"version": 1}, "body": {"version": 1}},
    )
    names = [name for name, t in checkpoint.state_dict().items() if t.is_floating_point() and name != "bin_edges"]
    checkpoint.param_names = tuple(names)
    if optimizer:
        checkpoint.optimizer = _adam(checkpoint.state_dict(), names, groups, randn)
    return checkpoint


def _linear(randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {"weight": randn(_CLASSES, _WIDTH), "bias": randn(_CLASSES)}


def _layers(randn: Callable[..., Tensor], width: int) -> dict[str, Tensor]:
    return {
        "down.weight": randn(width, _WIDTH),
        "down.bias": randn(width),
        "up.weight": randn(_CLASSES, width),
        "up.bias": randn(_CLASSES),
    }


def _adam(tensors: dict[str, Tensor], names: Sequence[str], groups: int, randn: Callable[..., Tensor]) -> Optimizer:
    weights = [name for name in names if tensors[name].ndim > 1]
    parts = [list(names)] if groups == 1 else [weights, [name for name in names if name not in weights]]
    options = {"lr": 0.001, "betas": (0.9, 0.999), "weight_decay": 0.0, "fused": None}
    state = {
        name: {
            "step": torch.tensor(4.0),
            "exp_avg": randn(*tensors[name].shape),
            "exp_avg_sq": randn(*tensors[name].shape).square(),
        }
        for name in names
        if name != "unused"
    }
    in_order = {name: state[name] for part in parts for name in part if name in state}
    return Optimizer([ParamGroup({**options}, part, (*options, "params")) for part in parts], in_order)


def samples() -> dict[str, Checkpoint]:
    """Return new sample checkpoints by name, one for each case that a plugin may get wrong."""
    return {
        "experts": make(),
        "single": make(experts=1),
        "two_experts": make(experts=2),
        "one_left": _one_left(),
        "many_experts": make(experts=11),
        "layered_experts": make(widths=(9, 5, 3)),
        "deleted_expert": _deleted_expert(),
        "hibernated": _hibernated(),
        "headless": make(experts=0),
        "head_first": make(position=0),
        "planned": _planned(),
        "turned_experts": _turned_experts(),
        "two_groups": make(groups=2),
        "no_optimizer": make(optimizer=False),
        "no_router": _no_router(),
        "bare": _bare(),
        "tied": _tied(),
        "dtypes": _with(_dtypes()),
        "shapes": _with(_shapes()),
        "odd_payload": _odd_payload(),
    }


def _one_left() -> Checkpoint:
    """Return a model with a list of one expert, as merging leaves it. Runtimes can load only a single head."""
    checkpoint = make(experts=1)
    rename_head(checkpoint, HeadKind.EXPERTS)
    return checkpoint


def _deleted_expert() -> Checkpoint:
    checkpoint = make()
    assert checkpoint.head is not None
    del checkpoint.head.experts[1]
    checkpoint.head.deleted = frozenset({1})
    return checkpoint


def _hibernated() -> Checkpoint:
    checkpoint = make()
    assert checkpoint.head is not None
    expert = checkpoint.head.experts[1]
    checkpoint.head.experts[1] = Expert({leaf: torch.zeros_like(tensor) for leaf, tensor in expert.items()})
    return checkpoint


def _planned() -> Checkpoint:
    checkpoint = make()
    metrics = {"parent_share": 0.5, "ptr_samples": 7}
    checkpoint.plan = SplitPlan(0, (9, 0), (9, 4), "ptr_hist_arc", RING, 3, metrics, step=4)
    assert checkpoint.optimizer is not None
    checkpoint.optimizer.extra = {"scheduled": [1, 2.5, None]}
    return checkpoint


def _turned_experts() -> Checkpoint:
    checkpoint = make()
    assert checkpoint.head is not None
    checkpoint.head.experts = dict(reversed(checkpoint.head.experts.items()))
    return checkpoint


def _no_router() -> Checkpoint:
    checkpoint = make(position=5)
    del checkpoint.core["router_map"]
    return checkpoint


def _bare() -> Checkpoint:
    checkpoint = replace(make(optimizer=False), payload={}, metadata=None, param_names=None)
    checkpoint.lifecycle = {i: Lifecycle() for i in checkpoint.lifecycle}
    return checkpoint


def _tied() -> Checkpoint:
    checkpoint = make()
    checkpoint.core["decoder.weight"] = checkpoint.core["body.weight"]
    return checkpoint


def _with(tensors: dict[str, Tensor]) -> Checkpoint:
    checkpoint = make()
    checkpoint.core |= tensors
    return checkpoint


def _dtypes() -> dict[str, Tensor]:
    return {f"as_{dtype}".replace("torch.", ""): arbitrary_tensor(dtype, (2, 3), 7) for dtype in DTYPES}


def _shapes() -> dict[str, Tensor]:
    return {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "strided": torch.arange(10)[::3],
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    }


def _odd_payload() -> Checkpoint:
    checkpoint = make()
    checkpoint.payload |= {
        "tuple": (1, (2.5, None)),
        "keys": {1: "one", "two": {-2: 2}},
        "ordered": OrderedDict(a=torch.ones(2), b=[True, -0.0, float("nan"), float("inf")]),
        "$dollar": {"$tensor": "no tensor"},
        "parameter": nn.Parameter(torch.ones(2), requires_grad=False),
        "ünïcode\ud800": "\0\ud800",
    }
    return checkpoint
