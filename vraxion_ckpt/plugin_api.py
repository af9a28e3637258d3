"""The names that a plugin may import. Everything else in this package may change without notice.

`CONTRACT` is the version of this contract. It is incremented when a name is added, changed or removed. A name that
will be removed raises a deprecation warning for one minor version of the package first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vraxion_ckpt.checkpoint.comparison import differences, same_bits
from vraxion_ckpt.checkpoint.dialects import Dialect
from vraxion_ckpt.checkpoint.expert_fit import unfit
from vraxion_ckpt.checkpoint.expert_health import has_nonfinite, is_zero, refuse_unhealthy
from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
from vraxion_ckpt.checkpoint.head_names import HeadNames, split_name
from vraxion_ckpt.checkpoint.invariants import router_owners
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle, SplitPlan, UnboundCheckpoint, unbound_state_dict
from vraxion_ckpt.checkpoint.optimizer_state import (
    Optimizer,
    OptimizerForm,
    OptimizerPart,
    ParamGroup,
    UnboundOptimizer,
)
from vraxion_ckpt.checkpoint.plain_data import bytes_of, checksum, named_references, named_tensors
from vraxion_ckpt.checkpoint.provenance import Ancestor, Neighbour, Origin, Record, StaleAfter
from vraxion_ckpt.checkpoint.references import TensorRef, as_reference
from vraxion_ckpt.checkpoint.ring import (
    Ints,
    Visits,
    Weights,
    as_weights,
    auto_arc_length,
    exact_sum,
    hottest_arc,
    total_by_owner,
)
from vraxion_ckpt.checkpoint.shared_memory import fills_storage, sharing, without_tied
from vraxion_ckpt.checkpoint.split_plan import (
    HOW_TO_COUNT_VISITS,
    lacking_in_request,
    load_plan,
    plan_as_json,
    plan_from_request,
    requested_by_trainer,
)
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.checkpoint.visits import load_visits
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
from vraxion_ckpt.experts.optimizer_clones import StatePolicy
from vraxion_ckpt.experts.preconditions import check_expert, head_of, head_of_experts, put_record
from vraxion_ckpt.experts.surgery import clone_expert, remove_expert, rename_head
from vraxion_ckpt.formats.document import document_text, dump_document, load_document
from vraxion_ckpt.formats.extras import OUR_KEY, OUR_PREFIX, Extras
from vraxion_ckpt.formats.payload import Parsed, build_payload, build_payload_references, make_extras, parse_payload
from vraxion_ckpt.formats.payload_dialect import (
    MONOLITH,
    ROUTER,
    monolith_dialect,
    origin_of,
    recorded_dialect,
    router_dialect,
)
from vraxion_ckpt.formats.safetensors_file import (
    LARGEST_SAFETENSORS_HEADER,
    NATIVE_DTYPE_NAMES,
    check_safetensors,
    is_tensor_name,
    starts_like_safetensors,
)
from vraxion_ckpt.formats.safetensors_writer import safetensors_size, save_safetensors
from vraxion_ckpt.formats.state_dict import from_state_dict, prefix_to_record, split_head, with_head
from vraxion_ckpt.formats.torch_archive import is_archive
from vraxion_ckpt.formats.torch_reader import load_torch_file
from vraxion_ckpt.formats.torch_writer import save_torch_file, torch_file_size
from vraxion_ckpt.plugins.adapter import Adapter, Faults, IncrementalDirectoryAdapter, Loss, OutputFile
from vraxion_ckpt.plugins.discovery import run_probes
from vraxion_ckpt.plugins.hookspecs import hookimpl
from vraxion_ckpt.plugins.options import IntList
from vraxion_ckpt.plugins.read_context import ReadContext
from vraxion_ckpt.plugins.transform import Effect, Transform
from vraxion_ckpt.support.json_files import dump_json, load_json, parse_json
from vraxion_ckpt.support.progress import progress_bar
from vraxion_ckpt.wording import count, listed, numbered, plural

if TYPE_CHECKING:
    import torch

CONTRACT = 2
NATIVE_DTYPES: frozenset[torch.dtype]  # made on first use, because most commands need no torch


def __getattr__(name: str) -> object:
    if name == "NATIVE_DTYPES":
        import torch

        return frozenset(getattr(torch, dtype) for dtype in NATIVE_DTYPE_NAMES)
    if name == "VRAXION":
        import warnings

        warnings.warn("VRAXION is deprecated; use HeadNames() or a head's names", DeprecationWarning, stacklevel=2)
        return HeadNames()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CONTRACT",
    "HOW_TO_COUNT_VISITS",
    "LARGEST_SAFETENSORS_HEADER",
    "MONOLITH",
    "NATIVE_DTYPES",
    "NATIVE_DTYPE_NAMES",
    "OUR_KEY",
    "OUR_PREFIX",
    "ROUTER",
    "Adapter",
    "Ancestor",
    "Checkpoint",
    "CkptError",
    "CkptWarning",
    "CorruptError",
    "Dialect",
    "Effect",
    "Expert",
    "Extras",
    "Faults",
    "Head",
    "HeadKind",
    "HeadNames",
    "InconsistentError",
    "IncrementalDirectoryAdapter",
    "IntList",
    "Ints",
    "Lifecycle",
    "LimitError",
    "Loss",
    "Neighbour",
    "Optimizer",
    "OptimizerForm",
    "OptimizerPart",
    "Origin",
    "OutputFile",
    "ParamGroup",
    "Parsed",
    "PluginError",
    "ReadContext",
    "Record",
    "SourceError",
    "SplitPlan",
    "StaleAfter",
    "StatePolicy",
    "StorageError",
    "TensorDict",
    "TensorRef",
    "Transform",
    "TransformError",
    "UnboundCheckpoint",
    "UnboundOptimizer",
    "UnsupportedError",
    "UsageError",
    "Visits",
    "Weights",
    "as_reference",
    "as_weights",
    "auto_arc_length",
    "build_payload",
    "build_payload_references",
    "bytes_of",
    "check_expert",
    "check_safetensors",
    "checksum",
    "clone_expert",
    "count",
    "differences",
    "document_text",
    "dump_document",
    "dump_json",
    "exact_sum",
    "fills_storage",
    "from_state_dict",
    "has_nonfinite",
    "head_of",
    "head_of_experts",
    "hookimpl",
    "hottest_arc",
    "is_archive",
    "is_tensor_name",
    "is_zero",
    "lacking_in_request",
    "listed",
    "load_document",
    "load_json",
    "load_plan",
    "load_torch_file",
    "load_visits",
    "make_extras",
    "monolith_dialect",
    "named_references",
    "named_tensors",
    "numbered",
    "origin_of",
    "parse_json",
    "parse_payload",
    "plan_as_json",
    "plan_from_request",
    "plural",
    "prefix_to_record",
    "progress_bar",
    "put_record",
    "recorded_dialect",
    "refuse_unhealthy",
    "remove_expert",
    "rename_head",
    "requested_by_trainer",
    "router_dialect",
    "router_owners",
    "run_probes",
    "safetensors_size",
    "same_bits",
    "save_safetensors",
    "save_torch_file",
    "sharing",
    "split_head",
    "split_name",
    "starts_like_safetensors",
    "torch_file_size",
    "total_by_owner",
    "unbound_state_dict",
    "unfit",
    "with_head",
    "without_tied",
    "write_new",
]
