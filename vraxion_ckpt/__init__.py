"""Offline surgery on the checkpoints of mixture-of-experts models.

Adapters turn files into one canonical checkpoint and back, transforms turn a checkpoint into a checkpoint, and the
core knows neither any format nor any transform by name. The modules, from the ground up:

========================  ==============================================================================
`errors`                  the error tree, one exit code a class
`printable`               what cannot be seen, spelt out (no torch)
`sources`                 the files that were read, and whether they changed (no torch)
`container`, `rehearsal`  a strict look at torch's zip archives, and at what their pickle asks for (no torch)
`textfile`                small files that a user names: regular, bounded, without waiting (no torch)
`jsonfile`, `yamlfile`    strict JSON and YAML (no torch)
`facts`                   what ``--json`` prints: models that are their own JSON Schema (no torch)
`disk`, `signals`         system calls; signals that end a run (no torch)
`plugin_calls`            run a plugin's code: its output to stderr, its exceptions as errors that name it (no torch)
`progress`                signs of progress on a terminal (no torch)
`manifest`                digests of files (no torch)
`transaction`, `commit`   from the old state to the new one, never a mix; stage, lock, clean up (no torch)
`head_names`              where a model family keeps its head (no torch)
`order_rules`             rules by which a trainer orders parameters (no torch)
`model`                   `Checkpoint`, `Head`, `Optimizer`: the canonical form
`plain`                   only plain data: what may stand in a checkpoint
`expert_health`           experts that should not be cloned: all zero, or not finite
`ring`, `balance`         arcs, windows, owners; how visits fall on experts: numpy
`trainers`, `buffers`     which trainer wrote a checkpoint; which tensors are buffers of torch's own modules
`assignment`, `binding`   optimizer ids ↔ parameter names
`torch_optimizer`         an optimizer's state dict as torch writes it
`parameter_order`         by which rule a trainer orders the parameters of its optimizer
`compare`, `invariants`   where two checkpoints differ; what must be true of one
`surgery`                 rename a head, clone or remove an expert with all that belongs to it
`placement`               where the parameters of a changed model go in the optimizer
`companions`, `following` averages of the model and the like; let them follow the head
`checkpoint_types`        whether a checkpoint that a plugin returned has the declared types
`lent_tensors`            whether a plugin wrote into a tensor that it was lent
`options`                 plugins whose fields are their options; ``NAME:key=value``
`adapter`, `transform`    the two base classes, and the chain
`adapter_calls`           every call of an adapter's methods, and the types of what they return
`hookspecs`, `plugins`    the plugin contract; discovery and names
`catalogue`               what is installed, and the options of one plugin
`torchfile`               the one door to ``.pt``
`tensorfile`              the one door to safetensors
`payload`                 the payload dict of VRAXION's trainers
`document`                a checkpoint as named tensors and one JSON document
`plan`, `visits`          split plans as files; files of visits per address
`reading`                 open a checkpoint of any format
`signs`, `inspection`     how visits fall on experts before and after; what a checkpoint is and holds
`matching`, `measure`     which expert is which of another checkpoint; how much tensors differ
`changes`, `difference`   what is different in a second checkpoint
`findings`                what is found about a checkpoint, and how bad it is
`optimizer_findings`      what looks wrong in an optimizer's state
`checking`                every finding about a checkpoint at once
`targets`, `summary`      where a result may go; what was done
`judging`                 run a chain, and what is refused before a byte is written
`pipeline`, `inplace`     convert and edit, top to bottom
`variables`, `recipe`     a conversion written down, and what is filled in
`reporting`               a checkpoint as a page, and as a picture
`schemas`                 the JSON Schemas of all that
`testing`                 suites that adapters and transforms subclass; sample checkpoints
`cli`                     the commands
========================  ==============================================================================

Names are imported when they are first used, so that importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vraxion_ckpt._version import __version__

if TYPE_CHECKING:
    from vraxion_ckpt.adapter import Adapter, Loss
    from vraxion_ckpt.changes import Difference
    from vraxion_ckpt.checking import Checked, check
    from vraxion_ckpt.difference import diff
    from vraxion_ckpt.errors import CkptError, CkptWarning, TransformError
    from vraxion_ckpt.hookspecs import hookimpl
    from vraxion_ckpt.inplace import Edited, edit
    from vraxion_ckpt.inspection import Inspection, inspect
    from vraxion_ckpt.model import (
        Checkpoint,
        Expert,
        Head,
        HeadKind,
        Lifecycle,
        Optimizer,
        ParamGroup,
        SplitPlan,
    )
    from vraxion_ckpt.pipeline import convert
    from vraxion_ckpt.reading import read as open
    from vraxion_ckpt.recipe import run
    from vraxion_ckpt.reporting import report
    from vraxion_ckpt.ring import Visits
    from vraxion_ckpt.summary import Summary
    from vraxion_ckpt.transform import Transform

__all__ = [
    "Adapter",
    "Checked",
    "Checkpoint",
    "CkptError",
    "CkptWarning",
    "Difference",
    "Edited",
    "Expert",
    "Head",
    "HeadKind",
    "Inspection",
    "Lifecycle",
    "Loss",
    "Optimizer",
    "ParamGroup",
    "SplitPlan",
    "Summary",
    "Transform",
    "TransformError",
    "Visits",
    "__version__",
    "check",
    "convert",
    "diff",
    "edit",
    "hookimpl",
    "inspect",
    "open",
    "report",
    "run",
]

_HOME = {
    "Adapter": "adapter",
    "Checked": "checking",
    "Checkpoint": "model",
    "CkptError": "errors",
    "CkptWarning": "errors",
    "Difference": "changes",
    "Edited": "inplace",
    "Expert": "model",
    "Head": "model",
    "HeadKind": "model",
    "Inspection": "inspection",
    "Lifecycle": "model",
    "Loss": "adapter",
    "Optimizer": "model",
    "ParamGroup": "model",
    "SplitPlan": "model",
    "Summary": "summary",
    "Transform": "transform",
    "TransformError": "errors",
    "Visits": "ring",
    "check": "checking",
    "convert": "pipeline",
    "diff": "difference",
    "edit": "inplace",
    "hookimpl": "hookspecs",
    "inspect": "inspection",
    "report": "reporting",
    "run": "recipe",
    "open": "reading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOME[name]}")
    value = getattr(module, "read" if name == "open" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
