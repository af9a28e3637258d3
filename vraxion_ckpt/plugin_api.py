"""All that a plugin may import. What is not exported here may change without notice.

`CONTRACT` is the version of this contract. It counts up when something is added, changed or removed. Before it is
removed, a name warns for one minor version of the package.
"""

from __future__ import annotations

from vraxion_ckpt.checkpoint import ring, split_plan
from vraxion_ckpt.checkpoint.comparison import differences, same_bits
from vraxion_ckpt.checkpoint.expert_health import has_nonfinite, is_zero, refuse_unhealthy
from vraxion_ckpt.checkpoint.head_names import VRAXION
from vraxion_ckpt.checkpoint.invariants import router_owners
from vraxion_ckpt.checkpoint.model import (
    Ancestor,
    Checkpoint,
    Expert,
    Head,
    HeadKind,
    Lifecycle,
    Optimizer,
    Origin,
    ParamGroup,
    Record,
    SplitPlan,
    UnboundCheckpoint,
    UnboundOptimizer,
    unbound_state_dict,
)
from vraxion_ckpt.checkpoint.plain_data import bytes_of, named_tensors, view_of
from vraxion_ckpt.checkpoint.ring import Ints, Visits, Weights
from vraxion_ckpt.checkpoint.visits import load as load_visits
from vraxion_ckpt.commit.system_calls import write_new
from vraxion_ckpt.errors import (
    CkptError,
    CkptWarning,
    CorruptError,
    InconsistentError,
    LimitError,
    PluginError,
    SourceError,
    StorageError,
    TransformError,
    UnsupportedError,
    UsageError,
)
from vraxion_ckpt.experts.surgery import OptimizerPolicy, clone_expert, remove_expert, rename_head
from vraxion_ckpt.formats import document, safetensors_file, torch_file
from vraxion_ckpt.formats.payload import (
    MONOLITH,
    OUR_KEY,
    ROUTER,
    Extras,
    Parsed,
    build_payload,
    make_extras,
    monolith_dialect,
    origin_of,
    parse_payload,
    recorded_dialect,
    router_dialect,
    split_head,
    with_head,
)
from vraxion_ckpt.formats.torch_archive import is_archive
from vraxion_ckpt.plugins.adapter import Adapter, Faults, IncrementalDirectoryAdapter, Loss, OutputFile
from vraxion_ckpt.plugins.discovery import probe_visits
from vraxion_ckpt.plugins.hookspecs import hookimpl
from vraxion_ckpt.plugins.options import IntList
from vraxion_ckpt.plugins.read_context import ReadContext
from vraxion_ckpt.plugins.transform import Effect, Transform
from vraxion_ckpt.support import json_files, progress

CONTRACT = 1

__all__ = [
    "CONTRACT",
    "MONOLITH",
    "OUR_KEY",
    "ROUTER",
    "VRAXION",
    "Adapter",
    "Ancestor",
    "Checkpoint",
    "CkptError",
    "CkptWarning",
    "CorruptError",
    "Effect",
    "Expert",
    "Extras",
    "Faults",
    "Head",
    "HeadKind",
    "InconsistentError",
    "IncrementalDirectoryAdapter",
    "IntList",
    "Ints",
    "Lifecycle",
    "LimitError",
    "Loss",
    "Optimizer",
    "OptimizerPolicy",
    "Origin",
    "OutputFile",
    "ParamGroup",
    "Parsed",
    "PluginError",
    "ReadContext",
    "Record",
    "SourceError",
    "SplitPlan",
    "StorageError",
    "Transform",
    "TransformError",
    "UnboundCheckpoint",
    "UnboundOptimizer",
    "UnsupportedError",
    "UsageError",
    "Visits",
    "Weights",
    "build_payload",
    "bytes_of",
    "clone_expert",
    "differences",
    "document",
    "has_nonfinite",
    "hookimpl",
    "is_archive",
    "is_zero",
    "json_files",
    "load_visits",
    "make_extras",
    "monolith_dialect",
    "named_tensors",
    "origin_of",
    "parse_payload",
    "probe_visits",
    "progress",
    "recorded_dialect",
    "refuse_unhealthy",
    "remove_expert",
    "rename_head",
    "ring",
    "router_dialect",
    "router_owners",
    "safetensors_file",
    "same_bits",
    "split_head",
    "split_plan",
    "torch_file",
    "unbound_state_dict",
    "view_of",
    "with_head",
    "write_new",
]
