"""Offline surgery on checkpoints of models with a ring-routed head of experts.

Adapters turn files into one canonical checkpoint and back. Transforms turn a checkpoint into a checkpoint. The core
knows no format and no transform by name. ``ARCHITECTURE.md`` in the source tree says what each sub-package is for.

Names are imported on first use, so that importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vraxion_ckpt._version import __version__

if TYPE_CHECKING:
    from vraxion_ckpt.analysis.changes import Difference
    from vraxion_ckpt.analysis.checking import Checked, check
    from vraxion_ckpt.analysis.difference import diff
    from vraxion_ckpt.analysis.inspection import inspect
    from vraxion_ckpt.analysis.inspection_facts import Inspection
    from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
    from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle, SplitPlan
    from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, ParamGroup
    from vraxion_ckpt.checkpoint.references import TensorRef
    from vraxion_ckpt.checkpoint.ring import Visits
    from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
    from vraxion_ckpt.conversion.convert import convert
    from vraxion_ckpt.conversion.edit import Edited, edit
    from vraxion_ckpt.conversion.summary import Summary
    from vraxion_ckpt.errors import CkptError, CkptWarning, TransformError
    from vraxion_ckpt.plugins.adapter import Adapter, Loss
    from vraxion_ckpt.plugins.hookspecs import hookimpl
    from vraxion_ckpt.plugins.transform import Transform
    from vraxion_ckpt.reading.opening import read as open
    from vraxion_ckpt.reading.read_options import ReadOptions
    from vraxion_ckpt.recipes.recipe import run
    from vraxion_ckpt.reporting.report import report

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
    "ReadOptions",
    "SplitPlan",
    "Summary",
    "TensorDict",
    "TensorRef",
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
    "Adapter": "plugins.adapter",
    "Checked": "analysis.checking",
    "Checkpoint": "checkpoint.model",
    "CkptError": "errors",
    "CkptWarning": "errors",
    "Difference": "analysis.changes",
    "Edited": "conversion.edit",
    "Expert": "checkpoint.head",
    "Head": "checkpoint.head",
    "HeadKind": "checkpoint.head",
    "Inspection": "analysis.inspection_facts",
    "Lifecycle": "checkpoint.model",
    "Loss": "plugins.adapter",
    "Optimizer": "checkpoint.optimizer_state",
    "ParamGroup": "checkpoint.optimizer_state",
    "ReadOptions": "reading.read_options",
    "SplitPlan": "checkpoint.model",
    "Summary": "conversion.summary",
    "TensorDict": "checkpoint.tensor_dict",
    "TensorRef": "checkpoint.references",
    "Transform": "plugins.transform",
    "TransformError": "errors",
    "Visits": "checkpoint.ring",
    "check": "analysis.checking",
    "convert": "conversion.convert",
    "diff": "analysis.difference",
    "edit": "conversion.edit",
    "hookimpl": "plugins.hookspecs",
    "inspect": "analysis.inspection",
    "report": "reporting.report",
    "run": "recipes.recipe",
    "open": "reading.opening",
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
