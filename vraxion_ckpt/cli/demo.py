"""Run the refinement loop on a bundled real checkpoint, and verify the results."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path

import torch
from rich.text import Text
from torch import nn

from vraxion_ckpt.analysis.inspection import inspect
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences
from vraxion_ckpt.checkpoint.invariants import preservation, router_owners
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.source_files import Sources
from vraxion_ckpt.cli import show_changes, show_inspection
from vraxion_ckpt.cli.terminal import band, console
from vraxion_ckpt.conversion.convert import convert
from vraxion_ckpt.errors import CkptError, InvariantError, OutOfMemoryError, UsageError
from vraxion_ckpt.formats.torch_reader import load_torch_file
from vraxion_ckpt.plugins.discovery import TransformLike
from vraxion_ckpt.printable import printable, printable_facts
from vraxion_ckpt.reading.opening import read

# The name of each result → its format.
_RESULTS = {"ckpt_post_split.pt": "pt", "ckpt_post_split_modular": "modular"}


def run_demo(directory: Path | None) -> None:
    """Inspect, convert and split the bundled ``head.single`` checkpoint, to ``.pt`` and to a modular directory.

    Raises:
        UsageError: `directory` has a file that is named like a result, but was not written by a demo.
        InvariantError: a result fails its verification.
    """
    out = console()
    folder = directory or Path(tempfile.mkdtemp(prefix="vraxion-ckpt-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    with resources.as_file(resources.files("vraxion_ckpt") / "demo_data") as data:
        source = data / "wallclock_single.pt"
        chain: list[TransformLike] = [
            "single_to_experts",
            ("arc_meta", {"visits": data / "wallclock_single.visits.json"}),
            "mitosis_split:noise=0",
        ]
        for name, to in _RESULTS.items():
            if os.path.lexists(folder / name):
                _refuse_others(folder / name, partial(convert, source, transforms=chain, to=to))

        _headline("1. A real checkpoint with a single head")
        show_inspection.print_inspection(printable_facts(inspect(source)))

        _headline("2. single_to_experts → arc_meta → mitosis_split, to .pt and to modular")
        targets = [folder / name for name in _RESULTS]
        for target, to in zip(targets, _RESULTS.values(), strict=True):
            done = convert(source, target, transforms=chain, to=to, overwrite=True)
            show_changes.print_conversion(printable_facts(done), verbose=to == "pt")
            out.print()

        before = read(source)
        afters = [read(target) for target in targets]
        _headline("3. The ring, before and after")
        for label, checkpoint in (("before", before), ("after", afters[0])):
            if checkpoint.router_map is not None:
                line = band(router_owners(checkpoint.router_map), out.width - 10)
                out.print(Text(f"{label:8}", style="bold") + line, soft_wrap=True)

        _headline("4. The proof")
        for target, after in zip(targets, afters, strict=True):
            _prove(before, after, target)
    out.print(Text(printable(f"\nThe results are in {folder}")), soft_wrap=True)


def _refuse_others(target: Path, write: Callable[[Path], object]) -> None:
    """Raise UsageError unless the target is the result of an earlier demo, possibly of another version."""
    with tempfile.TemporaryDirectory(prefix="vraxion-ckpt-demo-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Path(name) / target.name
        write(expected)
        try:
            same = not any(checkpoint_differences(_without_versions(read(expected)), _without_versions(read(target))))
        except OutOfMemoryError:
            raise
        except CkptError:
            same = False
    if not same:
        hint = "give another directory, or move the file away"
        raise UsageError("was not written by this demo, so it is not replaced", path=target, hint=hint)


def _without_versions(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, history=tuple(replace(record, version="") for record in checkpoint.history))


def _headline(text: str) -> None:
    console().print(Text(f"\n{text}\n", style="bold cyan"))


def _prove(before: Checkpoint, after: Checkpoint, target: Path) -> None:
    kept = preservation(before, after)
    if kept is None or kept.changed:
        raise InvariantError(f"the function is not preserved: {kept}", path=target)
    resumed = _resume_and_step(after, target)
    console().print(
        Text.assemble(
            (f"{target.name}\n", "bold"),
            f"  function preserved per address: {kept}\n"
            f"  a torch model of this shape loads it strictly; its Adam resumes the state of\n"
            f"  {resumed} parameters and takes a step",
        ),
        soft_wrap=True,
    )


def _resume_and_step(checkpoint: Checkpoint, target: Path) -> int:
    """Load model and optimizer into torch as a trainer does, and take a step. Return the number of parameters."""
    if checkpoint.optimizer is None or checkpoint.param_names is None:
        raise InvariantError("the optimizer is missing", path=target)
    model = _model_of_shape(checkpoint)
    model.load_state_dict(checkpoint.state_dict(), strict=True)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(_saved_optimizer(target))
    names = dict(model.named_parameters())
    for name, slots in checkpoint.optimizer.state.items():
        if not torch.equal(optimizer.state[names[name]]["exp_avg"], slots["exp_avg"]):
            raise InvariantError("the optimizer resumed a moment of another parameter", path=target, key=name)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    stepped = optimizer.state[names["head.experts.1.weight"]]["step"]
    if stepped != checkpoint.optimizer.state["head.experts.1.weight"]["step"] + 1:
        raise InvariantError("the child's step count is wrong after a training step", path=target)
    return len(checkpoint.optimizer.state)


def _saved_optimizer(target: Path) -> dict[str, object]:
    """Return the optimizer's state dict exactly as it is on disk."""
    file = target / "system" / "router.state" if target.is_dir() else target
    saved: dict[str, object] = load_torch_file(file, Sources())["optim"]
    return saved


def _model_of_shape(checkpoint: Checkpoint) -> nn.Module:
    """Build a torch module with the same parameters and buffers as the checkpoint, in the same order."""
    root = nn.Module()
    for name, tensor in checkpoint.state_dict().items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if name in (checkpoint.param_names or ()):
            module.register_parameter(leaf, nn.Parameter(torch.empty_like(tensor)))
        else:
            module.register_buffer(leaf, torch.empty_like(tensor))
    return root
