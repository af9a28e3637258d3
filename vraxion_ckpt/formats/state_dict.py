"""Separate the tensors of the head from those of the core in a state dict."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
from vraxion_ckpt.checkpoint.head_names import HeadNames, head_prefixes, split_name
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle
from vraxion_ckpt.checkpoint.provenance import Origin
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.errors import InconsistentError
from vraxion_ckpt.formats.extras import OUR_PREFIX
from vraxion_ckpt.formats.payload_dialect import origin_of_state_dict
from vraxion_ckpt.wording import listed

if TYPE_CHECKING:
    from torch import Tensor


_EXPERT = re.compile(r"(0|[1-9][0-9]{0,8})\.(.+)")


def find_head(tensor_names: Collection[str], path: Path, prefix: str | None = None) -> HeadNames | None:
    """Return the names of the head in a state dict, or None if there is no head.

    A head may stand below any one prefix. Further heads below it, or beside one without a prefix, are copies, such as
    averages inside the model.

    Args:
        tensor_names: the names in the state dict.
        path: the path of the checkpoint, for errors.
        prefix: the prefix, if it is known.

    Raises:
        InconsistentError: heads stand below several prefixes, or none stands below `prefix`.
    """
    prefixes = head_prefixes(tensor_names)
    if prefix is None:
        if prefixes and _outermost(prefixes) is None:
            message = f"heads stand below several prefixes: {listed([repr(each) for each in prefixes], 4)}"
            hint = f"name the model's prefix, as in --from pt:prefix={prefixes[0]}"
            raise InconsistentError(message, path=path, key="model", hint=hint)
        return HeadNames.below(prefixes[0]) if prefixes else None
    if prefix not in prefixes:
        hint = f"it stands below {listed([repr(each) for each in prefixes], 4)}" if prefixes else "it has no head"
        raise InconsistentError(f"no head stands below the prefix {prefix!r}", path=path, key="model", hint=hint)
    return HeadNames.below(prefix)


def prefix_to_record(checkpoint: Checkpoint, tensor_names: Collection[str]) -> str | None:
    """Return the prefix of the head if `find_head` would not find it in a state dict with these names, else None."""
    if checkpoint.head is None:
        return None
    prefix = checkpoint.head.names.prefix
    return None if _outermost(head_prefixes(tensor_names)) == prefix else prefix


def _outermost(prefixes: Sequence[str]) -> str | None:
    """Return the first of the prefixes if all others are below it, else None."""
    return prefixes[0] if prefixes and all(other.startswith(prefixes[0]) for other in prefixes) else None


def split_head(
    checkpoint: Checkpoint, path: Path, deleted: frozenset[int] = frozenset(), prefix: str | None = None
) -> Checkpoint:
    """Return a copy of a checkpoint with the tensors of its head moved from `core` to `head`.

    Args:
        checkpoint: a checkpoint whose `core` is the whole state dict, in order.
        path: the path of the checkpoint, for errors.
        deleted: ids of deleted experts.
        prefix: what precedes the names of the head, such as ``module.``; found if None.

    Raises:
        InconsistentError: there are both kinds of head, a name has no expert id, other tensors are between the tensors
            of the head or of one expert, or see `find_head`.
    """
    names = find_head(checkpoint.core.keys(), path, prefix)
    if names is None:
        return replace(checkpoint, core=TensorDict(checkpoint.core))
    core: dict[str, TensorRef] = {}
    single: dict[str, TensorRef] = {}
    experts: dict[int, dict[str, TensorRef]] = {}
    places: list[int] = []
    order: list[int] = []
    for place, (name, tensor) in enumerate(checkpoint.core.references().items()):
        if name.startswith(names.single):
            single[name.removeprefix(names.single)] = tensor
            places.append(place)
        elif name.startswith(names.experts):
            found = _EXPERT.fullmatch(name.removeprefix(names.experts))
            if not found:
                message = f"an expert's tensor must be called {names.experts}<id>.<name>"
                raise InconsistentError(message, path=path, key=name)
            experts.setdefault(int(found[1]), {})[found[2]] = tensor
            places.append(place)
            order.append(int(found[1]))
        else:
            core[name] = tensor
    if single and experts:
        raise InconsistentError(f"holds both {names.single}* and {names.experts}*", path=path, key="model")
    runs = 1 + sum(a != b for a, b in pairwise(order))
    if places[-1] - places[0] != len(places) - 1 or (experts and runs != len(experts)):
        message = "the tensors of the head, or of one expert, are not consecutive"
        raise InconsistentError(message, path=path, key="model")
    if single:
        head = Head(HeadKind.SINGLE, {0: Expert(single)}, places[0], names=names)
    else:
        head = Head(HeadKind.EXPERTS, {i: Expert(tensors) for i, tensors in experts.items()}, places[0], deleted, names)
    return with_head(replace(checkpoint, core=TensorDict(core)), head)


def with_head(checkpoint: Checkpoint, head: Head) -> Checkpoint:
    """Return the checkpoint with a head, and without ``num_experts`` in its payload, which the head determines."""
    payload = checkpoint.payload.copy()
    payload.pop("num_experts", None)
    return replace(checkpoint, head=head, payload=payload)


def from_state_dict(
    tensors: Mapping[str, Tensor | TensorRef], path: Path, format_name: str, prefix: str | None = None
) -> Checkpoint:
    """Return the checkpoint of a state dict that is stored without a document.

    Formats may sort tensors, so their order means nothing. The head's tensors are sorted by expert id and placed where
    the first of them was.

    Args:
        tensors: the stored tensors, or references, by name.
        path: the file or directory.
        format_name: the name of the adapter.
        prefix: what precedes the names of the head; found if None.

    Raises:
        InconsistentError: a name begins with `OUR_PREFIX`, so the document was lost; or see `split_head`.
    """
    if ours := [name for name in tensors if name.startswith(OUR_PREFIX)]:
        message = "is training state, but the metadata that describes it was lost"
        hint = "another tool has rewritten the file; use the original"
        raise InconsistentError(message, path=path, key=ours[0], hint=hint)
    names = find_head(tensors.keys(), path, prefix) or HeadNames()
    in_head = [name for name in tensors if name.startswith((names.single, names.experts))]
    head = sorted(in_head, key=lambda name: (split_name(name, names) or (-1,))[0])  # `split_head` rejects other names
    known = set(head)
    others = [name for name in tensors if name not in known]
    position = next((place for place, name in enumerate(tensors) if name in known), 0)
    order = [*others[:position], *head, *others[position:]]
    origin = origin_of_state_dict(Origin(format_name, path))
    found = split_head(
        Checkpoint(TensorDict((name, tensors[name]) for name in order), origin=origin), path, prefix=prefix
    )
    return replace(found, lifecycle={i: Lifecycle.unknown(0) for i in range(found.num_experts)})
