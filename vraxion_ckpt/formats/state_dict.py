"""Separate the tensors of the head from those of the core in a state dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
from vraxion_ckpt.checkpoint.head_names import VRAXION
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle
from vraxion_ckpt.checkpoint.provenance import Origin
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.errors import InconsistentError
from vraxion_ckpt.formats.extras import OUR_PREFIX
from vraxion_ckpt.formats.payload_dialect import origin_of_state_dict

if TYPE_CHECKING:
    from torch import Tensor

_EXPERT = re.compile(r"(0|[1-9][0-9]{0,8})\.(.+)")


def split_head(checkpoint: Checkpoint, path: Path, deleted: frozenset[int] = frozenset()) -> Checkpoint:
    """Return a copy of a checkpoint with the tensors of its head moved from `core` to `head`.

    Args:
        checkpoint: a checkpoint whose `core` is the whole state dict, in order.
        path: the path of the checkpoint, for errors.
        deleted: ids of deleted experts.

    Raises:
        InconsistentError: there are both kinds of head, a name has no expert id, or other tensors are between the
            tensors of the head or of one expert.
    """
    core: dict[str, TensorRef] = {}
    single: dict[str, TensorRef] = {}
    experts: dict[int, dict[str, TensorRef]] = {}
    places: list[int] = []
    order: list[int] = []
    for place, (name, tensor) in enumerate(checkpoint.core.references().items()):
        if name.startswith(VRAXION.single):
            single[name.removeprefix(VRAXION.single)] = tensor
            places.append(place)
        elif name.startswith(VRAXION.experts):
            found = _EXPERT.fullmatch(name.removeprefix(VRAXION.experts))
            if not found:
                message = "an expert's tensor must be called head.experts.<id>.<name>"
                raise InconsistentError(message, path=path, key=name)
            experts.setdefault(int(found[1]), {})[found[2]] = tensor
            places.append(place)
            order.append(int(found[1]))
        else:
            core[name] = tensor
    if single and experts:
        raise InconsistentError("holds both head.single.* and head.experts.*", path=path, key="model")
    if not places:
        return replace(checkpoint, core=TensorDict(core))
    runs = 1 + sum(a != b for a, b in pairwise(order))
    if places[-1] - places[0] != len(places) - 1 or (experts and runs != len(experts)):
        message = "the tensors of the head, or of one expert, are not consecutive"
        raise InconsistentError(message, path=path, key="model")
    if single:
        head = Head(HeadKind.SINGLE, {0: Expert(single)}, places[0])
    else:
        head = Head(HeadKind.EXPERTS, {i: Expert(tensors) for i, tensors in experts.items()}, places[0], deleted)
    return with_head(replace(checkpoint, core=TensorDict(core)), head)


def with_head(checkpoint: Checkpoint, head: Head) -> Checkpoint:
    """Return the checkpoint with a head, and without ``num_experts`` in its payload, which the head determines."""
    payload = checkpoint.payload.copy()
    payload.pop("num_experts", None)
    return replace(checkpoint, head=head, payload=payload)


def from_state_dict(tensors: Mapping[str, Tensor | TensorRef], path: Path, format_name: str) -> Checkpoint:
    """Return the checkpoint of a state dict that is stored without a document.

    Formats may sort tensors, so their order means nothing. The head's tensors are sorted by expert id and placed where
    the first of them was.

    Args:
        tensors: the stored tensors, or references, by name.
        path: the file or directory.
        format_name: the name of the adapter.

    Raises:
        InconsistentError: a name begins with `OUR_PREFIX`, so the document was lost; or see `split_head`.
    """
    if ours := [name for name in tensors if name.startswith(OUR_PREFIX)]:
        message = "is training state, but the metadata that describes it was lost"
        hint = "another tool has rewritten the file; use the original"
        raise InconsistentError(message, path=path, key=ours[0], hint=hint)
    head = sorted((name for name in tensors if name.startswith((VRAXION.single, VRAXION.experts))), key=_expert_id)
    known = set(head)
    others = [name for name in tensors if name not in known]
    position = next((place for place, name in enumerate(tensors) if name in known), 0)
    order = [*others[:position], *head, *others[position:]]
    origin = origin_of_state_dict(Origin(format_name, path))
    found = split_head(Checkpoint(TensorDict((name, tensors[name]) for name in order), origin=origin), path)
    return replace(found, lifecycle={i: Lifecycle.unknown(0) for i in range(found.num_experts)})


def _expert_id(name: str) -> int:
    expert = name.removeprefix(VRAXION.experts).partition(".")[0]
    return int(expert) if expert.isdecimal() and len(expert) < 10 else -1  # `split_head` rejects other names
