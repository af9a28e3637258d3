"""Update the companions of the head after a step has changed it.

Companions are averages and copies of the model, and lists with one entry for each parameter. If the names or positions
of their entries are known, the entries are renamed, copied and removed like the head's tensors. Otherwise the chain is
refused, unless the user chooses to keep or drop the companions (`CompanionPolicy`).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal

from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.places import with_value_at
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.errors import CkptWarning, TransformError
from vraxion_ckpt.experts.companion_growth import grown
from vraxion_ckpt.experts.companions import COMPANION_HINT, Companion, find_companions, prefixes_of
from vraxion_ckpt.experts.lr_schedules import with_schedules
from vraxion_ckpt.wording import listed

CompanionPolicy = Literal["grow", "keep", "drop"]


def follow(before: Checkpoint, after: Checkpoint, policy: CompanionPolicy) -> Checkpoint:
    """Return `after` with the companions of the head and the learning-rate schedulers updated.

    Args:
        before: the checkpoint before a step.
        after: the checkpoint after the step, with the optimizer's parameters in their final order.
        policy: ``grow`` updates the companions, ``keep`` leaves them unchanged, ``drop`` removes them.

    Raises:
        TransformError: a scheduler cannot be updated, or the policy is ``grow`` and a companion cannot be updated.
    """
    after = with_schedules(before, after)
    if before.head is None or after.head is None or not _head_has_changed(before, after):
        return after
    router_only = not _names_have_changed(before, after)
    found = [each for each in find_companions(before) if not router_only or each.has_router]
    if not found:
        return after
    if policy == "keep":
        warnings.warn(f"kept unchanged, as requested: {listed(found, 3)}", CkptWarning, stacklevel=3)
        return after
    if policy == "drop":
        warnings.warn(f"dropped, as requested: {listed(found, 3)}", CkptWarning, stacklevel=3)
        return _dropped(after, found)
    if not router_only and not after.ancestors and before.head.kind == after.head.kind:
        _refuse_unknown_origin(before, after, found[0])
    for each in found:
        if each.problem:
            raise TransformError(f"{each.problem}, so it cannot be updated", key=str(each), hint=COMPANION_HINT)
    return grown(before, after, found, router_only=router_only)


def _head_has_changed(before: Checkpoint, after: Checkpoint) -> bool:
    if _names_have_changed(before, after):
        return True
    old, new = before.router_reference, after.router_reference
    return old is not None and new is not None and old is not new and not same_bits(old, new)


def _names_have_changed(before: Checkpoint, after: Checkpoint) -> bool:
    assert before.head is not None
    assert after.head is not None
    return bool(after.ancestors) or prefixes_of(before.head) != prefixes_of(after.head)


def _refuse_unknown_origin(before: Checkpoint, after: Checkpoint, companion: Companion) -> None:
    assert before.head is not None
    assert after.head is not None
    new = [prefix for prefix in prefixes_of(after.head) if prefix not in prefixes_of(before.head)]
    if new:
        raise TransformError(
            f"cannot be updated, because the transform does not state the source of {new[0].removesuffix('.')}",
            key=str(companion),
            hint=COMPANION_HINT,
        )


def _dropped(after: Checkpoint, found: list[Companion]) -> Checkpoint:
    """Remove companions. In the payload and the optimizer, remove the whole top-level entry that contains one.

    If the entry also contains an optimizer, put None in the place of the companion.
    """
    parts = after.optimizer.parts if after.optimizer else ()
    beside = {part.place[0] for part in parts if part.place}
    for each in found:
        if each.place[0] == "model":
            names = [name for name in after.core if name.startswith(each.prefix)]
            assert after.head is not None
            ahead = sum(name.startswith(each.prefix) for name in list(after.core)[: after.head.position])
            gone = set(names)
            kept = {name: tensor for name, tensor in after.core.references().items() if name not in gone}
            after.core = TensorDict(kept)
            after.head = replace(after.head, position=after.head.position - ahead)
            module = each.prefix.removesuffix(".")
            if after.metadata is not None:
                after.metadata = {
                    name: value
                    for name, value in after.metadata.items()
                    if name != module and not name.startswith(each.prefix)
                }
        elif each.place[0] == "payload" and each.place[1] in beside:
            after.payload = TensorDict(with_value_at(after.payload.references(), each.place[1:], None))
        elif each.place[0] == "payload":
            kept = {key: value for key, value in after.payload.as_stored().items() if key != each.place[1]}
            after.payload = TensorDict(kept)
        elif after.optimizer is not None:
            extra = after.optimizer.extra.references()
            at, key = (extra, each.place[1]) if len(parts) == 1 else (extra[str(each.place[1])], each.place[2])
            kept = {name: value for name, value in at.items() if name != key}
            if len(parts) > 1:
                extra.pop(str(each.place[1]))
                kept = {**extra, **({str(each.place[1]): kept} if kept else {})}
            after.optimizer = replace(after.optimizer, extra=TensorDict(kept))
    return after
