"""Plugins that write behind torch's back, exit, return wrong types or print: exit code 15 with their name."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import forked
import numpy as np
import pluggy
import pytest
import torch
from pydantic import field_validator
from support import DATA
from torch import nn

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint.comparison import differences
from vraxion_ckpt.checkpoint.head import Expert
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle
from vraxion_ckpt.checkpoint.optimizer_state import UnboundOptimizer
from vraxion_ckpt.conversion.edit import Edited
from vraxion_ckpt.errors import CkptWarning, OutOfMemoryError, PluginError, TransformError
from vraxion_ckpt.plugins import discovery
from vraxion_ckpt.plugins.adapter import Adapter, Loss, OutputFile
from vraxion_ckpt.plugins.discovery import resolve_adapter
from vraxion_ckpt.plugins.options import configure
from vraxion_ckpt.plugins.read_context import ReadContext
from vraxion_ckpt.plugins.transform import Effect, Transform
from vraxion_ckpt.testing import make, untouched

EXPERTS3 = DATA / "named_experts3.pt"


class Odd(BaseException):
    """Of no class that anybody catches."""


EXITS = {
    "SystemExit": SystemExit(0),
    "GeneratorExit": GeneratorExit(),
    "CancelledError": asyncio.CancelledError(),
    "Odd": Odd("no reason"),
    "StopIteration": StopIteration(),
    "RecursionError": RecursionError("too deep"),
    "KeyError": KeyError("x"),
    "BaseExceptionGroup": BaseExceptionGroup("two", [SystemExit(0), Odd()]),
}


class Misbehaves(Transform):
    """Do what a test says; change nothing otherwise."""

    name: ClassVar[str] = "misbehaves"
    body: ClassVar[Any] = staticmethod(lambda checkpoint: checkpoint)
    said: ClassVar[Any] = staticmethod(Effect.changed)
    beside: ClassVar[Any] = staticmethod(lambda _: {})

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        return type(self).body(checkpoint)

    def effect(self) -> Effect:
        return type(self).said()

    def side_files(self, checkpoint: Checkpoint) -> Any:
        return type(self).beside(checkpoint)


def transform(name: str = "misbehaves", **methods: Any) -> Transform:
    """Return a transform with some methods of its own."""
    return type(
        "T", (Misbehaves,), {"name": name, "__doc__": "x.", **{k: staticmethod(v) for k, v in methods.items()}}
    )()


def raises(error: BaseException) -> Any:
    def fail(*_: Any) -> Any:
        raise error

    return fail


@pytest.fixture
def source(tmp_path):
    """Give a function that writes the sample in a format; the file must be the same at the end."""
    held = {}

    def write(kind: str) -> Path:
        checkpoint = make()
        checkpoint.payload["ema"] = {"w": torch.arange(6.0), "list": [torch.ones(3)]}
        place = tmp_path / "source" / {"pt": "c.pt", "modular": "c", "safetensors": "c.safetensors"}[kind]
        place.parent.mkdir(exist_ok=True)
        start = place.parent / "start.pt"
        resolve_adapter("pt").write(checkpoint, start)
        if kind == "pt":
            start.rename(place)
        else:
            vc.convert(start, place, to=kind, losses="ignore")
            start.unlink()
        held.update({path: path.read_bytes() for path in place.parent.rglob("*") if path.is_file()})
        return place

    yield write
    assert {path: path.read_bytes() for path in (tmp_path / "source").rglob("*") if path.is_file()} == held


def refused(run: Any, name: str = "misbehaves") -> PluginError:
    with pytest.raises(PluginError) as refusal:
        run()
    assert (refusal.value.key, refusal.value.exit_code) == (name, 15), refusal.value
    return refusal.value


def changes(one: Path, other: Path) -> list[str]:
    """Compare two files of torch.save by torch, but for what this package has recorded."""
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    return list(differences({**a, "vraxion_ckpt": None}, {**b, "vraxion_ckpt": None}))


# --- writes that torch does not count ---


def _through_pointer(tensor: torch.Tensor) -> None:
    ctypes.memset(tensor.data_ptr(), 42, tensor.numel() * tensor.itemsize)


def _through_storage(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().fill_(42)


WRITES = {
    "data": lambda t: t.data.fill_(42),
    "view of data": lambda t: t.data.view(-1)[:1].add_(1),
    "numpy": lambda t: t.numpy().fill(42),
    "memoryview": lambda t: memoryview(t.numpy().reshape(-1)).cast("B").__setitem__(0, 42),
    "from_numpy": lambda t: torch.from_numpy(t.numpy()).fill_(42),
    "storage": _through_storage,
    "pointer": _through_pointer,
    "other shape": lambda t: setattr(t, "data", t.data.reshape(-1)),
    "gradient": lambda t: t.requires_grad_(),
    "other data": lambda t: setattr(t, "data", torch.zeros_like(t)),
}
PLACES = {
    "core": lambda c: c.core["theta"],
    "router": lambda c: c.router_map,
    "expert": lambda c: c.head.experts[1]["weight"],
    "slot": lambda c: c.optimizer.state["head.experts.1.weight"]["exp_avg"],
    "payload": lambda c: c.payload["ema"]["w"],
    "list in the payload": lambda c: c.payload["ema"]["list"][0],
}


def writes(how: str, where: str) -> Any:
    def body(checkpoint: Checkpoint) -> Checkpoint:
        WRITES[how](PLACES[where](checkpoint))
        return checkpoint

    return body


@pytest.mark.parametrize("how", WRITES)
def test_a_write_is_found_however_it_is_done(how, source, tmp_path):
    chain = [transform(body=writes(how, "expert"), said=Effect.exact)]
    error = refused(lambda: vc.convert(source("pt"), tmp_path / "o.pt", transforms=chain))
    assert "wrote into" in error.message
    assert not (tmp_path / "o.pt").exists()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", ["pt", "modular", "safetensors"])
@pytest.mark.parametrize("where", PLACES)
def test_a_write_is_found_wherever_it_is_done(where, kind, source, tmp_path):
    path, chain = source(kind), [transform(body=writes("data", where))]
    for dry_run in (False, True):
        refused(lambda dry=dry_run: vc.convert(path, tmp_path / "o.pt", transforms=chain, dry_run=dry, losses="ignore"))
        refused(lambda dry=dry_run: vc.edit(path, transforms=chain, dry_run=dry, losses="ignore"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("kind", ["pt", "modular", "safetensors"])
def test_a_tensor_that_is_given_the_data_of_another_is_found(kind, source, tmp_path):
    def body(checkpoint: Checkpoint) -> Checkpoint:
        checkpoint.head.experts[1]["weight"].data = checkpoint.head.experts[0]["weight"].data
        return checkpoint

    chain = [transform(body=body)]
    refused(lambda: vc.convert(source(kind), tmp_path / "o.pt", transforms=chain, losses="ignore"))


def test_a_write_beside_a_change_of_another_expert_is_found_in_place(source):
    def body(checkpoint: Checkpoint) -> Checkpoint:
        checkpoint.head.experts[0] = Expert({k: t.clone() for k, t in checkpoint.head.experts[0].items()})
        checkpoint.head.experts[1]["weight"].data.zero_()
        return checkpoint

    refused(lambda: vc.edit(source("modular"), transforms=[transform(body=body)]))


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_in_a_chain_the_one_that_writes_is_named(guilty, source, tmp_path):
    chain = [transform(name=f"step{i}", **({"body": writes("numpy", "core")} if i == guilty else {})) for i in range(3)]
    refused(lambda: vc.convert(source("pt"), tmp_path / "o.pt", transforms=chain), name=f"step{guilty}")


def test_a_later_step_that_refuses_what_an_earlier_one_has_done_is_not_named(source, tmp_path):
    chain = [transform(body=writes("data", "router")), "experts_to_single"]
    refused(lambda: vc.convert(source("pt"), tmp_path / "o.pt", transforms=chain))


def test_a_write_into_what_an_earlier_step_has_made_is_found(source, tmp_path):
    def write_into_clone(checkpoint: Checkpoint) -> Checkpoint:
        checkpoint.head.experts[3]["weight"].data.fill_(42)
        return checkpoint

    chain = [
        ("mitosis_split", {"parent": 0, "addresses": [0, 3], "noise": 0}),
        transform(body=write_into_clone),
    ]
    refused(lambda: vc.convert(source("pt"), tmp_path / "o.pt", transforms=chain))


def test_a_chain_that_writes_nothing_passes_and_gives_the_same_bytes(source, tmp_path):
    path = source("pt")
    vc.convert(path, tmp_path / "a.pt")
    vc.convert(path, tmp_path / "b.pt", transforms=[transform(), transform()])
    assert not changes(tmp_path / "a.pt", tmp_path / "b.pt")


def test_a_source_that_changes_meanwhile_is_no_fault_of_the_plugin(tmp_path):
    shutil.copy(EXPERTS3, tmp_path / "s.pt")

    def body(checkpoint: Checkpoint) -> Checkpoint:
        other = torch.load(tmp_path / "s.pt", weights_only=True)
        other["model"]["router_map"] = other["model"]["router_map"] * 0
        torch.save(other, tmp_path / "new.pt")
        (tmp_path / "new.pt").replace(tmp_path / "s.pt")
        return checkpoint

    with pytest.raises(vc.CkptError) as refusal:
        vc.convert(tmp_path / "s.pt", tmp_path / "o.pt", transforms=[transform(body=body)])
    assert refusal.value.exit_code == 13


def test_the_conformance_kit_sees_such_writes():
    for write in WRITES.values():
        checkpoint = make()
        with pytest.raises(AssertionError), untouched(checkpoint):
            write(checkpoint.head.experts[1]["weight"])


# --- exits, and what only looks like an error of ours ---


def _validator(error: BaseException) -> Transform:
    class Validates(Misbehaves):
        """Fail while an option is checked."""

        option: int = 0

        @field_validator("option")
        @classmethod
        def check(cls, _: int) -> int:
            raise error

    return configure(Validates, {"option": 1})


@pytest.mark.one_in(3)
@pytest.mark.parametrize("error", EXITS)
@pytest.mark.parametrize("method", ["body", "said", "beside", "validator"])
def test_whatever_a_transform_raises_names_it(method, error, tmp_path):
    def run() -> object:
        step = _validator(EXITS[error]) if method == "validator" else transform(**{method: raises(EXITS[error])})
        return vc.convert(EXPERTS3, tmp_path / "o.pt", transforms=[step])

    assert type(EXITS[error]).__name__ in refused(run).message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError("can't allocate memory: 1 bytes")])
def test_interruptions_and_lack_of_memory_are_not_the_plugins_fault(error, tmp_path):
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutOfMemoryError
    with pytest.raises(expected):
        vc.convert(EXPERTS3, tmp_path / "o.pt", transforms=[transform(body=raises(error))])
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_ours_that_a_plugin_raises_stays_what_it_is(tmp_path):
    with pytest.raises(TransformError):
        vc.convert(EXPERTS3, tmp_path / "o.pt", transforms=[transform(body=raises(TransformError("no")))])


# --- wrong types from a transform ---


class Subclass(torch.Tensor):
    """No plain tensor."""


def with_core(value: Any) -> Any:
    return lambda c: replace(c, core={**c.core, "theta": value})


def with_head(**fields: Any) -> Any:
    return lambda c: replace(c, head=replace(c.head, **fields))


def with_optimizer(**fields: Any) -> Any:
    return lambda c: replace(c, optimizer=replace(c.optimizer, **fields))


def _quantised() -> torch.Tensor:
    return torch.ops.aten._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.qint8)


RESULTS = {
    "None": lambda _: None,
    "a dict": lambda c: c.core,
    "a list in the core": with_core([0, 1]),
    "an array in the core": with_core(np.zeros(3)),
    "a sparse tensor": with_core(torch.zeros(2, 2).to_sparse()),
    "a meta tensor": with_core(torch.empty(2, device="meta")),
    "a quantised tensor": lambda c: with_core(_quantised())(c),
    "a subclass": with_core(torch.zeros(2).as_subclass(Subclass)),
    "a buffer": with_core(nn.Buffer(torch.zeros(2)).as_subclass(Subclass)),
    "an endless tensor": with_core(torch.zeros(1).expand(10**12)),
    "a number as a name": lambda c: replace(c, core={**c.core, 3: torch.zeros(1)}),
    "a list for the core": lambda c: replace(c, core=list(c.core)),
    "a dict for the head": lambda c: replace(c, head={"experts": c.head.experts}),
    "text for the kind": with_head(kind="experts"),
    "a dict for an expert": lambda c: with_head(experts={**c.head.experts, 1: dict(c.head.experts[1])})(c),
    "text for an id": lambda c: with_head(experts={str(i): e for i, e in c.head.experts.items()})(c),
    "a list of experts": lambda c: with_head(experts=list(c.head.experts.values()))(c),
    "numbers in an expert": lambda c: with_head(experts={0: Expert(lambda: {"weight": [1.0]})})(c),
    "an expert that fails": lambda c: with_head(experts={0: Expert(raises(SystemExit(0)))})(c),
    "text for the position": with_head(position="0"),
    "a list of deleted": with_head(deleted=[0]),
    "text for the names": with_head(names="head."),
    "a dict for the optimizer": lambda c: replace(c, optimizer={"state": {}}),
    "a dict for a group": with_optimizer(groups=[{"params": []}]),
    "numbers for parameters": lambda c: with_optimizer(
        groups=[replace(g, params=list(range(len(g.params)))) for g in c.optimizer.groups]
    )(c),
    "a list for the state": with_optimizer(state=[]),
    "a tensor for slots": with_optimizer(state={"theta": torch.zeros(1)}),
    "an object in a slot": with_optimizer(state={"theta": {"exp_avg": object()}}),
    "a list for the payload": lambda c: replace(c, payload=[1]),
    "an object in the payload": lambda c: replace(c, payload={"x": {"y": object()}}),
    "a dict for a row": lambda c: replace(c, lifecycle={0: {"tenured": True}}),
    "text in a row": lambda c: replace(c, lifecycle={i: Lifecycle(tenured="yes") for i in range(3)}),
    "a dict for the plan": lambda c: replace(c, plan={"parent": 0}),
    "a list for the history": lambda c: replace(c, history=["x"]),
    "text for the names of parameters": lambda c: replace(c, param_names="theta"),
    "a list for the metadata": lambda c: replace(c, metadata=[]),
    "text for the origin": lambda c: replace(c, origin="pt"),
    "a list for the sources": lambda c: replace(c, sources=[]),
    "an unbound optimizer": lambda c: c.with_unbound(UnboundOptimizer({"state": {}})),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("result", RESULTS)
def test_a_wrong_type_from_apply_names_the_transform(result, tmp_path):
    refused(lambda: vc.convert(EXPERTS3, tmp_path / "o.pt", transforms=[transform(body=RESULTS[result])]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf"), "0", True, torch.zeros(1)], ids=str)
def test_noise_that_is_none_is_refused(noise, tmp_path):
    refused(lambda: vc.convert(EXPERTS3, tmp_path / "o.pt", transforms=[transform(said=lambda: Effect(noise))]))


@pytest.mark.parametrize(
    "change", [lambda core: core.update(theta_ptr_reduced=core["theta_ptr_reduced"] + 1), dict.popitem]
)
def test_a_core_tensor_that_changes_although_the_effect_is_exact_is_refused(change, tmp_path):
    def body(checkpoint: Checkpoint) -> Checkpoint:
        change(checkpoint.core)
        return checkpoint

    with pytest.raises(vc.CkptError) as refusal:
        vc.convert(EXPERTS3, tmp_path / "o.pt", transforms=[transform(body=body, said=Effect.exact)])
    assert refusal.value.exit_code == 11
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("effect", [None, 0.0, "exact"], ids=str)
def test_an_effect_of_another_type_is_refused(effect, tmp_path):
    refused(lambda: vc.convert(EXPERTS3, tmp_path / "o.pt", transforms=[transform(said=lambda: effect)]))


@pytest.mark.parametrize("files", [None, [], {"x": b""}, {Path("x"): "text"}, {Path("x"): None}, 3], ids=str)
def test_side_files_that_are_none_are_refused(files, tmp_path):
    refused(lambda: vc.convert(EXPERTS3, tmp_path / "o.pt", transforms=[transform(beside=lambda _: files)]))


# --- adapters ---


class Odds(Adapter):
    """Files of one tensor in the hands of a test."""

    name: ClassVar[str] = "odds"
    suffixes: ClassVar[tuple[str, ...]] = (".odds",)

    @classmethod
    def detect(cls, path: Path) -> bool:
        return path.suffix == ".odds"

    def read(self, path: Path, context: ReadContext) -> Checkpoint:
        found = resolve_adapter("pt").read(path, context)
        return replace(found, origin=replace(found.origin, format=self.name))

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        resolve_adapter("pt").write(checkpoint, path)


def adapter(**methods: Any) -> Adapter:
    return type("A", (Odds,), {"__doc__": "x.", **methods})()


ADAPTER_METHODS = ["read", "losses", "held", "write"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("error", EXITS)
@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_whatever_an_adapter_raises_names_it(method, error, tmp_path):
    odd = adapter(**{method: raises(EXITS[error])})
    refused(lambda: vc.convert(EXPERTS3, tmp_path / "o.odds", to=odd), name="odds")
    assert list(tmp_path.iterdir()) == []


WRONG = [
    ("read", lambda *_: None),
    ("read", lambda _, *given: replace(resolve_adapter("pt").read(*given), core={"x": [1]})),
    ("losses", lambda *_: None),
    ("losses", lambda *_: ["a loss"]),
    ("losses", lambda *_: [Loss("what", 3)]),
    ("held", lambda *_: None),
    ("held", lambda _, c: replace(c, payload=[])),
    ("is_directory", property(lambda _: "no")),
    ("is_directory", property(raises(SystemExit(0)))),
]


@pytest.mark.parametrize(("method", "value"), WRONG)
def test_a_wrong_type_from_an_adapter_names_it(method, value, tmp_path):
    odd = adapter(**{method: value})
    refused(lambda: vc.convert(EXPERTS3, tmp_path / "o.odds", to=odd), name="odds")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_drops_what_it_does_not_declare_is_named(tmp_path):
    odd = adapter(held=lambda _, checkpoint: checkpoint.with_optimizer(None))
    refused(lambda: vc.convert(EXPERTS3, tmp_path / "o.odds", to=odd), name="odds")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", [None, "3", -1, True, SystemExit(0)], ids=str)
def test_a_wrong_size_names_the_adapter(answer, tmp_path):
    shutil.copy(EXPERTS3, tmp_path / "c.odds")
    told = raises(answer) if isinstance(answer, BaseException) else lambda *_: answer
    odd, chain = adapter(size=told), [("mitosis_split", {"parent": 0, "addresses": [0], "noise": 0})]

    def run() -> Edited:
        return vc.edit(tmp_path / "c.odds", from_=odd, transforms=chain, dry_run=True)

    if answer is None:
        assert run().bytes_written > 0
    else:
        refused(run, name="odds")


@pytest.mark.parametrize("answer", [3, SystemExit(0)], ids=str)
def test_a_wrong_dialect_and_detection_name_the_adapter(answer, tmp_path, registered):
    shutil.copy(EXPERTS3, tmp_path / "c.odds")
    told = raises(answer) if isinstance(answer, BaseException) else lambda *_: answer
    registered(type(adapter(dialect=told)))
    refused(lambda: vc.inspect(tmp_path / "c.odds", from_="odds"), name="odds")
    registered(type(adapter(detect=classmethod(told))))
    (tmp_path / "unknown").write_text("?")
    with pytest.warns(CkptWarning, match="odds"):
        refused(lambda: vc.inspect(tmp_path / "unknown"), name="odds")
    with pytest.warns(CkptWarning, match="odds"):
        assert vc.inspect(EXPERTS3).format == "pt"  # the others work


def test_a_fault_of_an_adapter_is_no_finding_about_the_checkpoint(tmp_path):
    shutil.copy(EXPERTS3, tmp_path / "c.odds")
    for method in ("read", "examine"):
        odd = adapter(**{method: raises(SystemExit(0))})
        refused(lambda odd=odd: vc.check(tmp_path / "c.odds", from_=odd), name="odds")


def test_what_an_adapter_opens_and_verifies_later_names_it(tmp_path):
    shutil.copy(EXPERTS3, tmp_path / "c.odds")

    def closed(opener: Any) -> Any:
        def read(_: Adapter, path: Path, context: ReadContext) -> Checkpoint:
            found = Odds().read(path, context)
            return replace(found, head=replace(found.head, experts={i: Expert(opener) for i in range(3)}))

        return read

    def unverified(_: Adapter, path: Path, context: ReadContext) -> Checkpoint:
        found = Odds().read(path, context)
        context.sources.add(path, next(iter(context.sources)).fingerprint, raises(SystemExit(0)))
        return found

    readers = [closed(raises(SystemExit(0))), closed(lambda: {"weight": 3}), closed(lambda: None), unverified]
    for read in readers:
        odd = adapter(read=read)
        refused(lambda odd=odd: vc.convert(tmp_path / "c.odds", tmp_path / "o.pt", from_=odd), name="odds")
        refused(lambda odd=odd: vc.check(tmp_path / "c.odds", from_=odd), name="odds")


@pytest.mark.parametrize("method", ["losses", "held", "write"])
@pytest.mark.parametrize("where", ["core", "expert", "slot"])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_an_adapter_that_writes_into_the_checkpoint_is_found(kind, where, method, source, tmp_path):
    def writing(self: Adapter, checkpoint: Checkpoint, *rest: Any) -> Any:
        PLACES[where](checkpoint).data.fill_(1)
        return getattr(Odds, method)(self, checkpoint, *rest)

    odd = adapter(**{method: writing})
    refused(lambda: vc.convert(source(kind), tmp_path / "o.odds", to=odd), name="odds")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source"]


def test_an_adapter_that_writes_into_what_the_chain_has_made_is_found(source, tmp_path):
    def held(_: Adapter, checkpoint: Checkpoint) -> Checkpoint:
        checkpoint.head.experts[3]["weight"].data.fill_(1)
        return checkpoint

    chain = [("mitosis_split", {"parent": 0, "addresses": [0, 3], "noise": 0})]
    odd = adapter(held=held)
    refused(lambda: vc.convert(source("pt"), tmp_path / "o.odds", to=odd, transforms=chain), name="odds")


def _directory(**methods: Any) -> Adapter:
    """Return the built-in directory format with some methods of its own."""
    kind = type(resolve_adapter("modular"))
    return type("D", (kind,), {"name": "odds", "__doc__": "x.", **methods})()


FILE = OutputFile(object(), lambda _: None, lambda: 1)
DIRECTORY = [
    ("foreign_files", lambda *_: None),
    ("foreign_files", lambda *_: ["x"]),
    ("output_files", lambda *_: None),
    ("output_files", lambda *_: {"x": 3}),
    ("output_files", lambda *_: {"system/router.state": OutputFile(object(), raises(Odd()), lambda: 1)}),
    ("output_files", lambda *_: {"system/router.state": OutputFile(object(), lambda _: None, lambda: None)}),
    ("output_files", lambda *_: {"experts/meta.json": OutputFile(1, lambda _: None, lambda: 1)}),
    ("output_files", lambda *_: {"../out": FILE, "system/router.state": FILE}),
    ("output_files", lambda *_: {"/out": FILE, "system/router.state": FILE}),
    ("output_files", lambda *_: {"system/router.state": OutputFile(torch.zeros(3), lambda _: None, lambda: 1)}),
    ("is_ignored", lambda *_: None),
    ("read_overlay", lambda *_: None),
]


@pytest.mark.parametrize(("method", "value"), [*DIRECTORY, *((m, raises(Odd())) for m in dict(DIRECTORY))])
def test_a_directory_format_that_misbehaves_in_place_is_named(method, value, source):
    odd = _directory(**{method: value})
    chain = [("mitosis_split", {"parent": 0, "addresses": [0, 3], "noise": 0})]
    path = source("modular")

    def run() -> None:
        vc.edit(path, from_=odd, transforms=chain, dry_run=True)
        vc.edit(path, from_=odd, transforms=chain)

    refused(run, name="odds")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


# --- probes ---


@pytest.fixture
def registered(monkeypatch):
    """Register an adapter as an installed plugin does."""
    found = discovery.registry()

    def register(kind: type[Adapter]) -> None:
        offer = discovery.Registered(kind, "odds", "odd-package", "1")
        monkeypatch.setitem(found.adapters, kind.name, [offer])

    return register


@pytest.mark.parametrize("answer", [3, [1] * 64, SystemExit(0), "writes", "writes behind"], ids=str)
def test_a_probe_that_misbehaves_is_named(answer, tmp_path):
    def probe(checkpoint: Checkpoint) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, str):
            tensor = checkpoint.core["router_map"]
            (tensor.data if "behind" in answer else tensor).fill_(0)
            return vc.Visits(np.ones(64))
        return answer

    manager = discovery.registry().manager
    plugin = types.SimpleNamespace(probe_visits=pluggy.HookimplMarker("vraxion_ckpt")(probe))
    manager.register(plugin, name="odd-package:prober")
    try:
        error = refused(lambda: vc.convert(EXPERTS3, tmp_path / "o.pt", transforms=["arc_meta"]), name="prober")
    finally:
        manager.unregister(plugin)
    assert "odd-package" in str(error)
    assert list(tmp_path.iterdir()) == []


# --- installed, from the command line ---

PLUGIN = '''
import os, subprocess, sys
from sys import stdout
from typing import ClassVar
from vraxion_ckpt.plugin_api import Checkpoint, Effect, Transform, hookimpl
from vraxion_ckpt.plugins.discovery import resolve_adapter

print("at import")
os.system("echo from a shell at import")

class Odd(BaseException): ...

def make(body):
    class T(Transform):
        """x"""
        name: ClassVar[str] = body.__name__
        def effect(self): return Effect.exact()
        def apply(self, c):
            body(c)
            return c
    return T

def behind(c): c.head.experts[1]["weight"].data.fill_(42.0)
def leave(c): raise SystemExit(0)
def odd(c): raise Odd()
def listy(c): c.core["router_map"] = [0, 1]
def loud(c):
    print("by print")
    stdout.write("by an old reference")
    os.write(1, b"by a descriptor")
    subprocess.run(["echo", "by a child"])
    import ctypes
    ctypes.CDLL(None).puts(b"by C")


@hookimpl
def register_transforms():
    print("while registering")
    return [make(f) for f in (behind, leave, odd, listy, loud)]
'''
EXITS_AT_IMPORT = "import sys\nprint('leaving')\nsys.exit(0)\n"
NO_LIST = "from vraxion_ckpt import hookimpl\n@hookimpl\ndef register_transforms(): return None\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Install plugins by a path and an entry point."""
    folder = tmp_path_factory.mktemp("site")
    for name, code in {"odd_plugin": PLUGIN, "leaving": EXITS_AT_IMPORT, "no_list": NO_LIST}.items():
        facts = folder / f"{name}-0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0\n")
        (facts / "entry_points.txt").write_text(f"[vraxion_ckpt]\n{name} = {name}\n")
        (folder / f"{name}.py").write_text(code)
    return folder


def run(site: Path, *arguments: object, shell: str = "") -> subprocess.CompletedProcess[str]:
    # What a shell closes cannot be passed on to a fork.
    command = [sys.executable if shell else forked.python(), *forked.COMMAND, *map(str, arguments)]
    if shell:
        command = ["sh", "-c", f'"$@" {shell}', "sh", *command]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("name", ["behind", "leave", "odd", "listy"])
def test_an_installed_transform_that_misbehaves_ends_as_exit_15(name, site, tmp_path):
    done = run(site, "convert", EXPERTS3, tmp_path / "o.pt", "-t", name)
    assert done.returncode == 15, done.stderr
    assert f"[{name}]" in done.stderr
    assert "odd-plugin" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_plugin_prints_goes_to_stderr(site, tmp_path):
    done = run(site, "convert", EXPERTS3, tmp_path / "o.pt", "--json", "-t", "loud")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["history"][0]["name"] == "loud"
    said = ["by print", "by an old reference", "by a descriptor", "by a child", "by C"]
    for text in (*said, "at import", "from a shell at import", "while registering", "leaving"):
        assert text in done.stderr, text


@pytest.mark.one_in(3)
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_it_runs_where_standard_streams_are_closed(closed, site, tmp_path):
    done = run(site, "convert", EXPERTS3, tmp_path / "o.pt", "-t", "loud", shell=closed)
    assert done.returncode == 0, done.stderr
    assert not changes(EXPERTS3, tmp_path / "o.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["o.pt"]


def test_plugins_that_cannot_be_loaded_are_named_and_the_others_work(site):
    done = run(site, "plugins", "--json")
    assert done.returncode == 0, done.stderr
    reasons = {broken["distribution"]: broken["reason"] for broken in json.loads(done.stdout)["broken"]}
    assert reasons.keys() == {"leaving", "no-list"}
    assert "SystemExit" in reasons["leaving"]
    assert "NoneType" in reasons["no-list"]


# --- redirection in a process that goes on ---


def test_output_is_redirected_and_comes_back(capfd, tmp_path):
    def body(checkpoint: Checkpoint) -> Checkpoint:
        sys.stdout.write("inside\n")
        os.write(1, b"through the descriptor\n")
        vc.inspect(EXPERTS3)  # calls plugins itself
        sys.stdout.write("still inside\n")
        return checkpoint

    sys.stdout.write("before\n")
    vc.convert(EXPERTS3, tmp_path / "o.pt", transforms=[transform(body=body)])
    with pytest.raises(PluginError):
        vc.convert(EXPERTS3, tmp_path / "p.pt", transforms=[transform(body=raises(Odd()))])
    sys.stdout.write("after\n")
    os.write(1, b"and below\n")
    told = capfd.readouterr()
    assert told.out == "before\nafter\nand below\n"
    for text in ("inside", "through the descriptor", "still inside"):
        assert text in told.err


def test_several_threads_may_run_plugins_at_once(capfd, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def one(number: int) -> None:
        chain = [transform(body=lambda c: (sys.stdout.write("inside\n"), c)[1])]
        vc.convert(EXPERTS3, tmp_path / f"{number}.pt", transforms=chain)

    before = sys.stdout
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(8)))
    assert sys.stdout is before
    os.write(1, b"after\n")
    told = capfd.readouterr()
    assert told.out == "after\n"
    assert told.err.count("inside") == 8
