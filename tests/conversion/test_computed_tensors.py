"""Tensors that a transform only describes, and that are computed when they are written."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import vraxion_ckpt as vc
from tests.tools.support import DATA
from vraxion_ckpt.plugin_api import Checkpoint, Effect, Expert, PluginError, TensorRef, Transform

SOURCE = DATA / "named_experts3.pt"


def changed(function: Any, dtype: str | None) -> Transform:
    """Return a transform that maps every floating-point tensor of the model and the optimizer."""

    def mapped(value: Any) -> Any:
        is_float = isinstance(value, TensorRef) and value.is_floating_point()
        return value.mapped(function, dtype=dtype) if is_float else value

    class Mapped(Transform):
        """Map every tensor."""

        name: ClassVar[str] = "mapped"

        def effect(self) -> Effect:
            return Effect.changed()

        def apply(self, checkpoint: Checkpoint) -> Checkpoint:
            assert checkpoint.head is not None
            assert checkpoint.optimizer is not None
            for name, tensor in checkpoint.core.references().items():
                checkpoint.core[name] = mapped(tensor)
            for i, expert in checkpoint.head.experts.items():
                checkpoint.head.experts[i] = Expert({leaf: mapped(t) for leaf, t in expert.references().items()})
            for name, slots in checkpoint.optimizer.state.references().items():
                checkpoint.optimizer.state[name] = {slot: mapped(value) for slot, value in slots.items()}
            return checkpoint

    return Mapped()


@pytest.mark.parametrize("target", ["o.pt", "o.safetensors", "o/"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64", None])
def test_the_result_is_that_of_the_function(target: str, dtype: str | None, tmp_path: Path) -> None:
    def function(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor * 3).to(getattr(torch, dtype) if dtype else tensor.dtype)

    vc.convert(SOURCE, f"{tmp_path}/{target}", transforms=[changed(function, dtype)])
    before, after = vc.open(SOURCE), vc.open(tmp_path / target.rstrip("/"))
    pairs = [(before.state_dict(), after.state_dict())]
    assert before.optimizer is not None
    assert after.optimizer is not None
    pairs += [(before.optimizer.state[name], after.optimizer.state[name]) for name in before.optimizer.state]
    for olds, news in pairs:
        assert list(olds) == list(news)
        for name, old in olds.items():
            if isinstance(old, torch.Tensor):
                expected = function(old) if old.is_floating_point() else old
                assert news[name].dtype == expected.dtype
                assert torch.equal(news[name], expected)


def test_an_edit_in_place_writes_what_the_function_returns(tmp_path: Path) -> None:
    vc.convert(SOURCE, tmp_path / "d", to="modular")
    vc.edit(tmp_path / "d", transforms=[changed(lambda t: t + 1, None)])
    olds, news = vc.open(SOURCE).state_dict(), vc.open(tmp_path / "d").state_dict()
    assert all(torch.equal(news[n], t + 1 if t.is_floating_point() else t) for n, t in olds.items())


def test_a_function_that_writes_into_its_tensor_changes_nothing_else(tmp_path: Path) -> None:
    content = SOURCE.read_bytes()
    vc.convert(SOURCE, tmp_path / "o.pt", transforms=[changed(lambda t: t.mul_(2), None)])
    assert SOURCE.read_bytes() == content
    olds, news = vc.open(SOURCE).state_dict(), vc.open(tmp_path / "o.pt").state_dict()
    assert all(torch.equal(news[n], t * 2 if t.is_floating_point() else t) for n, t in olds.items())


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda t: t.double(), "float64"),
        (lambda t: t.reshape(-1)[:1], r"not torch\.float32"),
        (lambda t: t.no_such_method(), "AttributeError"),
        (lambda _: None, "AttributeError"),
    ],
)
def test_a_function_that_fails_or_returns_something_else_is_a_plugin_error(
    function: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(PluginError, match=says):
        vc.convert(SOURCE, tmp_path / "o.pt", transforms=[changed(function, None)])
    assert not list(tmp_path.iterdir())


def test_a_later_step_sees_the_computed_tensors(tmp_path: Path) -> None:
    split = "mitosis_split:parent=0,addresses=[0],noise=0"
    vc.convert(SOURCE, tmp_path / "o.pt", transforms=[changed(lambda t: t * 2, None), split])
    model = torch.load(tmp_path / "o.pt", weights_only=True)["model"]
    assert torch.equal(model["head.experts.3.weight"], model["head.experts.0.weight"])
    assert torch.equal(model["head.experts.0.weight"], vc.open(SOURCE).state_dict()["head.experts.0.weight"] * 2)
