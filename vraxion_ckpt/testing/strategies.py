"""Hypothesis strategies for tensors, payload values and checkpoints."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, ParamGroup
from vraxion_ckpt.checkpoint.shared_memory import without_tied

# All dtypes of dense tensors in torch, except quantised ones.
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

_TEXT = st.text(st.characters(), max_size=8)
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(width=64, allow_nan=True), _TEXT)
_KEYS = st.recursive(
    st.one_of(_SCALARS, st.binary(max_size=4), st.complex_numbers(), st.sampled_from([torch.float16, torch.int8])),
    lambda inner: st.lists(inner, max_size=2).map(tuple),
    max_leaves=3,
)
_OTHERS = st.one_of(
    st.binary(max_size=8),
    st.binary(min_size=1020, max_size=1030),
    st.binary(max_size=8).map(bytearray),
    st.complex_numbers(),
    st.lists(st.integers(0, 2**40), max_size=3).map(torch.Size),
    st.sampled_from([torch.bfloat16, torch.float8_e5m2, torch.device("cpu"), torch.device("cuda", 1), torch.strided]),
    st.sets(_KEYS, max_size=3),
    st.dictionaries(_KEYS, st.integers(), max_size=3).map(Counter),
)
_SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
_RESERVED = frozenset({"model", "optim", "optimizer", "num_experts", "param_names", "vraxion_ckpt", "router_map"})


def arbitrary_tensor(dtype: torch.dtype, shape: Sequence[int], seed: int) -> Tensor:
    """Return a tensor of random bits. Values may be NaNs with payloads, subnormals and infinities."""
    count = torch.Size(shape).numel() * dtype.itemsize
    data = bytearray(random.Random(seed).randbytes(count))
    if dtype == torch.bool:
        data = bytearray(byte % 2 for byte in data)
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.clone().view(dtype).reshape(tuple(shape))


def tensors(
    shapes: st.SearchStrategy[tuple[int, ...]] = _SHAPES, dtypes: Sequence[torch.dtype] = DTYPES
) -> st.SearchStrategy[Tensor]:
    """Generate dense tensors of arbitrary bits. Some are not contiguous."""

    def build(dtype: torch.dtype, shape: tuple[int, ...], seed: int, turned: bool) -> Tensor:
        tensor = arbitrary_tensor(dtype, shape, seed)
        return _turned(tensor) if turned else tensor

    return st.builds(build, st.sampled_from(dtypes), shapes, st.integers(0, 2**32), st.booleans())


def _turned(tensor: Tensor) -> Tensor:
    """Return the same values with other strides."""
    # torch cannot copy strided tensors of these dtypes.
    if tensor.ndim < 2 or tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return tensor
    order = list(range(tensor.ndim))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def plain_values() -> st.SearchStrategy[Any]:
    """Generate all kinds of values that a payload may hold, nested in dicts, lists and tuples."""
    return st.recursive(
        _SCALARS | tensors() | _OTHERS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(_TEXT | st.integers(-5, 5), inner, max_size=3),
            st.dictionaries(_KEYS, inner, max_size=3),
            st.dictionaries(_TEXT, inner, max_size=2).map(OrderedDict),
        ),
        max_leaves=6,
    )


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    """Generate consistent checkpoints: any head or none, deleted experts, tied tensors, one or two param groups."""
    kind = draw(st.sampled_from(["none", "single", "experts"]))
    names = draw(st.lists(_TEXT.filter(lambda name: name not in _RESERVED), unique=True, max_size=4))
    core = {f"body.{name}": draw(tensors()) for name in names}
    tie = draw(st.booleans())
    if core and tie:
        core["body.tied"] = core[f"body.{names[0]}"]
    head, count = None, 0
    if kind != "none":
        head = draw(_heads(HeadKind(kind)))
        count = head.num_experts
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


def run_on_generated(test: Callable[[Checkpoint], None], examples: int) -> None:
    """Run a test on generated checkpoints, which are the same in every run."""
    fixed = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,  # pytest does not show the notes of grouped failures
    )
    fixed(given(checkpoints())(test))()


@st.composite
def _heads(draw: st.DrawFn, kind: HeadKind) -> Head:
    single = kind is HeadKind.SINGLE
    count = 1 if single else draw(st.integers(2, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]))
    leaves = draw(st.sampled_from([("weight",), ("weight", "bias"), ("down.weight", "up.bias")]))
    shapes = {leaf: draw(_SHAPES) for leaf in leaves}
    experts = {
        i: Expert({leaf: draw(tensors(st.just(shapes[leaf]), [dtype])) for leaf in leaves}) for i in range(count)
    }
    deleted = frozenset() if single else draw(st.frozensets(st.integers(0, count - 1), max_size=count - 1))
    return Head(kind, {i: expert for i, expert in experts.items() if i not in deleted}, 0, deleted)


@st.composite
def _optimizers(draw: st.DrawFn, checkpoint: Checkpoint) -> Optimizer:
    floating = ((name, tensor) for name, tensor in checkpoint.state_dict().items() if tensor.is_floating_point())
    params = dict(without_tied(floating))  # only one of several tied tensors is a parameter
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
