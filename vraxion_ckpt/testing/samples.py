"""Checkpoints to test with: named samples, and a hypothesis strategy for any other."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle, SplitPlan
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, ParamGroup
from vraxion_ckpt.checkpoint.shared_memory import without_tied
from vraxion_ckpt.experts.surgery import rename_head

RING = 12
_WIDTH, _CLASSES = 6, 4

# Every dtype that a dense tensor of torch may have, quantised ones aside.
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)


def make(
    *,
    experts: int = 3,
    widths: Sequence[int] = (),
    position: int | None = None,
    groups: int = 1,
    optimizer: bool = True,
    seed: int = 0,
) -> Checkpoint:
    """Make a checkpoint like VRAXION's: a small body, a ring of `RING` addresses, a head, Adam's state.

    Args:
        experts: 0 for no head, 1 for a single one.
        widths: inner width of each expert, for experts of two layers.
        position: how many core tensors stand before the head; all of them if None.
        groups: 1, or 2 for a group of weights and one of the rest.
        optimizer: whether there is one; the parameter ``unused`` has no state.
        seed: of the tensors' values.
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
        leaves = [{"weight": randn(_CLASSES, _WIDTH), "bias": randn(_CLASSES)} for _ in range(experts)]
        if widths:
            leaves = [
                {
                    "down.weight": randn(width, _WIDTH),
                    "down.bias": randn(width),
                    "up.weight": randn(_CLASSES, width),
                    "up.bias": randn(_CLASSES),
                }
                for width in widths
            ]
        head = Head(kind, {i: Expert(tensors) for i, tensors in enumerate(leaves)}, len(core))
        if position is not None:
            head.position = position
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
    """Return new sample checkpoints by name: one for each thing that a plugin may stumble over."""
    experts = make()
    assert experts.head is not None
    deleted = experts.copy()
    assert deleted.head is not None
    del deleted.head.experts[1]
    deleted.head.deleted = frozenset({1})
    tied = make()
    tied.core["decoder.weight"] = tied.core["body.weight"]
    dtypes = make()
    dtypes.core |= {f"as_{dtype}".replace("torch.", ""): _of_bits(dtype, (2, 3), 7) for dtype in DTYPES}
    odd = make()
    odd.payload |= {
        "tuple": (1, (2.5, None)),
        "keys": {1: "one", "two": {-2: 2}},
        "ordered": OrderedDict(a=torch.ones(2), b=[True, -0.0, float("nan"), float("inf")]),
        "$dollar": {"$tensor": "no tensor"},
        "parameter": nn.Parameter(torch.ones(2), requires_grad=False),
        "ünïcode\ud800": "\0\ud800",
    }
    shapes = make()
    shapes.core |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "strided": torch.arange(10)[::3],
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    }
    planned = make()
    planned.plan = SplitPlan(
        0, (9, 0), (9, 4), "ptr_hist_arc", RING, 3, {"parent_share": 0.5, "ptr_samples": 7}, step=4
    )
    assert planned.optimizer is not None
    planned.optimizer.extra = {"scheduled": [1, 2.5, None]}
    hibernated = make()
    assert hibernated.head is not None
    hibernated.head.experts[1] = Expert({n: torch.zeros_like(t) for n, t in hibernated.head.experts[1].items()})
    turned = make()
    assert turned.head is not None
    turned.head.experts = dict(reversed(turned.head.experts.items()))
    unrouted = make(position=5)
    del unrouted.core["router_map"]
    bare = replace(make(optimizer=False), payload={}, metadata=None, param_names=None)
    bare.lifecycle = {i: Lifecycle() for i in bare.lifecycle}
    return {
        "experts": experts,
        "single": make(experts=1),
        "two_experts": make(experts=2),
        "one_left": _one_left(),
        "many_experts": make(experts=11),
        "layered_experts": make(widths=(9, 5, 3)),
        "deleted_expert": deleted,
        "hibernated": hibernated,
        "headless": make(experts=0),
        "head_first": make(position=0),
        "planned": planned,
        "turned_experts": turned,
        "two_groups": make(groups=2),
        "no_optimizer": make(optimizer=False),
        "no_router": unrouted,
        "bare": bare,
        "tied": tied,
        "dtypes": dtypes,
        "shapes": shapes,
        "odd_payload": odd,
    }


def _one_left() -> Checkpoint:
    """Return a model whose other experts were merged into one; a single head again is what it needs."""
    checkpoint = make(experts=1)
    rename_head(checkpoint, HeadKind.EXPERTS)
    return checkpoint


def _of_bits(dtype: torch.dtype, shape: Sequence[int], seed: int) -> Tensor:
    """Return a tensor of arbitrary bits: NaNs with payloads, subnormals, infinities; a bool is only ever 0 or 1."""
    count = torch.Size(shape).numel() * dtype.itemsize
    data = bytearray(random.Random(seed).randbytes(count))
    if dtype == torch.bool:
        data = bytearray(byte % 2 for byte in data)
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.clone().view(dtype).reshape(tuple(shape))


# --- strategies ---

_TEXT = st.text(st.characters(), max_size=8)
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(width=64, allow_nan=True), _TEXT)
_SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
_RESERVED = frozenset({"model", "optim", "optimizer", "num_experts", "param_names", "vraxion_ckpt", "router_map"})


def tensors(
    shapes: st.SearchStrategy[tuple[int, ...]] = _SHAPES, dtypes: Sequence[torch.dtype] = DTYPES
) -> st.SearchStrategy[Tensor]:
    """Generate dense tensors of arbitrary bits, not all of them contiguous."""

    def build(dtype: torch.dtype, shape: tuple[int, ...], seed: int, turned: bool) -> Tensor:
        tensor = _of_bits(dtype, shape, seed)
        return _turned(tensor) if turned else tensor

    return st.builds(build, st.sampled_from(dtypes), shapes, st.integers(0, 2**32), st.booleans())


def _turned(tensor: Tensor) -> Tensor:
    """Return the same values with other strides."""
    order = list(range(tensor.ndim))[::-1]
    flipped = tensor.permute(order)
    # Not every dtype has a copying kernel for strided tensors; bytes do.
    if tensor.ndim < 2 or tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return tensor
    return flipped.contiguous().permute(order)


def plain_values() -> st.SearchStrategy[Any]:
    """Generate what a payload may hold: nested dicts, lists and tuples, numbers to the bit, text, tensors."""
    return st.recursive(
        _SCALARS | tensors(),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(_TEXT | st.integers(-5, 5), inner, max_size=3),
            st.dictionaries(_TEXT, inner, max_size=2).map(OrderedDict),
        ),
        max_leaves=6,
    )


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    """Generate consistent checkpoints: any head, deleted experts, ties, one group or two, any plain payload."""
    kind = draw(st.sampled_from(["none", "single", "experts"]))
    names = draw(st.lists(_TEXT.filter(lambda name: name not in _RESERVED), unique=True, max_size=4))
    core = {f"body.{name}": draw(tensors()) for name in names}
    tie = draw(st.booleans())
    if core and tie:
        core["body.tied"] = core[f"body.{names[0]}"]
    head, count = None, 0
    if kind != "none":
        count = 1 if kind == "single" else draw(st.integers(2, 4))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]))
        leaves = draw(st.sampled_from([("weight",), ("weight", "bias"), ("down.weight", "up.bias")]))
        shapes = {leaf: draw(_SHAPES) for leaf in leaves}
        experts = {
            i: Expert({leaf: draw(tensors(st.just(shapes[leaf]), [dtype])) for leaf in leaves}) for i in range(count)
        }
        deleted = draw(st.sets(st.integers(0, count - 1), max_size=count - 1)) if kind == "experts" else set()
        head = Head(
            HeadKind(kind),
            {i: expert for i, expert in experts.items() if i not in deleted},
            0,
            frozenset(deleted),
        )
        core["router_map"] = torch.tensor(
            draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=8)),
            dtype=draw(st.sampled_from([torch.int64, torch.int32, torch.uint8])),
        )
        head.position = draw(st.integers(0, len(core)))
    checkpoint = Checkpoint(core, head)
    checkpoint.payload = draw(
        st.dictionaries(_TEXT.filter(lambda key: key not in _RESERVED), plain_values(), max_size=3)
    )
    if draw(st.booleans()):
        checkpoint.payload["step"] = draw(st.integers(0, 10**6))
    checkpoint.lifecycle = {
        i: Lifecycle(draw(st.floats(0, 10)), draw(st.integers(0, 9)), draw(st.integers(0, 9)), draw(st.booleans()))
        for i in range(count)
    }
    if draw(st.booleans()):
        checkpoint.metadata = {"": {"version": 1}, "body": {"version": draw(st.integers(1, 3)), "note": (1, None)}}
    if draw(st.booleans()):
        checkpoint.optimizer = draw(_optimizers(checkpoint))
        order = list(checkpoint.state_dict())
        checkpoint.param_names = tuple(sorted(checkpoint.optimizer.params, key=order.index))
    return checkpoint


@st.composite
def _optimizers(draw: st.DrawFn, checkpoint: Checkpoint) -> Optimizer:
    floating = ((name, tensor) for name, tensor in checkpoint.state_dict().items() if tensor.is_floating_point())
    params = dict(without_tied(floating))  # of tied tensors, one is a parameter
    cut = draw(st.integers(0, len(params)))
    parts = [list(params)[:cut], list(params)[cut:]] if draw(st.booleans()) else [list(params)]
    named = draw(st.booleans())
    groups = [
        ParamGroup(
            {"lr": draw(st.floats(0, 1)), "betas": (0.9, draw(st.floats(0, 1))), "foreach": None},
            part,
            ("lr", "betas", "foreach", "params", *(["param_names"] if named else [])),
        )
        for part in parts
    ]
    state: dict[str, dict[str, Any]] = {}
    for name, tensor in params.items():
        if draw(st.booleans()):
            like = tensors(st.just(tuple(tensor.shape)), [torch.float32, torch.bfloat16])
            state[name] = {"step": draw(st.integers(0, 9)), "exp_avg": draw(like), "buffer": draw(st.none() | like)}
    return Optimizer(groups, state)
