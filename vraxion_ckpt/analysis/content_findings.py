"""Check the contents of a checkpoint: everything except its files and the binding of its optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

from vraxion_ckpt.analysis.binding_findings import about_lacking, about_order
from vraxion_ckpt.analysis.findings import Finding
from vraxion_ckpt.analysis.optimizer_findings import about_optimizer, count_negative, is_never_negative
from vraxion_ckpt.analysis.tensor_facts import value_facts
from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.expert_health import HOW_TO_RESTORE, is_finite, is_zero
from vraxion_ckpt.checkpoint.head import HeadKind
from vraxion_ckpt.checkpoint.invariants import router_owners
from vraxion_ckpt.checkpoint.model import Checkpoint, unbound_state_dict
from vraxion_ckpt.checkpoint.plain_data import named_references, size_of
from vraxion_ckpt.checkpoint.ring import as_addresses, owning_experts
from vraxion_ckpt.checkpoint.tensor_dict import referenced
from vraxion_ckpt.experts import companions
from vraxion_ckpt.support import progress
from vraxion_ckpt.wording import listed, numbered, shortened


def about_contents(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Check everything except the values of tensors."""
    yield from _about_memory(checkpoint)
    for line in invariants.invariant_findings(checkpoint):
        yield Finding.error("invariant", line)
    yield from about_lacking(checkpoint)
    head_is_open = checkpoint.head is None or all(expert.is_open for expert in checkpoint.head.experts.values())
    if head_is_open:
        yield from about_order(checkpoint)
    for companion in companions.stale_companions(checkpoint) if head_is_open else ():
        what = f"{companion.problem}: it was not updated when the head changed"
        yield Finding.warning("companion", what, where=str(companion))
    head = checkpoint.head
    if head is None:
        yield Finding.note("head", "the model has no head of experts, so no transform can split it")
    elif head.kind is HeadKind.EXPERTS and head.num_experts == 1:
        yield Finding.error(
            "one head",
            "a runtime with one expert expects head.single, and silently ignores head.experts.0",
            hint="run mitosis_split or experts_to_single",
        )
    yield from _about_zeros(checkpoint)
    yield from _about_ring(checkpoint)
    yield from _about_step(checkpoint)
    yield from _about_rows(checkpoint)
    yield from _about_plan(checkpoint)
    yield from about_optimizer(checkpoint)


def _about_memory(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Report tensors that share memory."""
    slots = {
        f"{name}.{slot}"
        for name, entries in (checkpoint.optimizer.state.references() if checkpoint.optimizer else {}).items()
        for slot in entries
    }
    for tie in invariants.shared_names(checkpoint):
        what = f"{listed(tie, 4)} share memory"
        if slots.intersection(tie):
            hint = "give each its own copy; a training step would update all of them"
            yield Finding.error("shared memory", what, hint=hint)
        elif any(not name.startswith("payload.") for name in tie):
            yield Finding.warning("shared memory", f"{what}: they are tied and trained as one")


def _about_ring(checkpoint: Checkpoint) -> Iterator[Finding]:
    head, router = checkpoint.head, checkpoint.router_reference
    if head is None:
        return
    if router is None:
        yield Finding.note("ring", "the model has no router_map")
        return
    if router.ndim != 1 or router.is_floating_point() or router.is_complex():
        return  # reported as an invariant
    owning = owning_experts(router_owners(router))
    idle = [i for i in head.experts if i not in owning]
    if idle:
        what = f"no address belongs to {numbered('expert', idle)}: no input is routed there"
        yield Finding.warning("ring", what)
    gone = sorted(owning & head.deleted)
    if gone:
        what = f"addresses belong to {numbered('expert', gone)}, whose tensors were garbage-collected"
        yield Finding.note("ring", what)


def _about_zeros(checkpoint: Checkpoint) -> Iterator[Finding]:
    experts = checkpoint.head.experts if checkpoint.head else {}
    zero = [i for i, expert in experts.items() if expert.is_open and is_zero(expert)]
    if zero:
        what = f"all weights of {numbered('expert', zero)} are zero"
        yield Finding.warning("hibernated", what, hint=HOW_TO_RESTORE)


def _about_step(checkpoint: Checkpoint) -> Iterator[Finding]:
    step = checkpoint.payload.get("step")
    if step is not None and checkpoint.known_step is None:
        what = f"is {_in_words(step)}, not a whole number ≥ 0; rows and plans cannot be compared with it"
        yield Finding.warning("step", what, where="payload.step")


def _in_words(value: object) -> str:
    text = repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"
    return shortened(text, 40)


def _about_rows(checkpoint: Checkpoint) -> Iterator[Finding]:
    if checkpoint.known_step is None:
        return
    stated = {i: row for i, row in checkpoint.lifecycle.items() if not row.assumed}
    late = [i for i, row in stated.items() if max(row.created_step, row.last_used_step) > checkpoint.step]
    if late:
        what = f"the lifecycle row of {numbered('expert', late)} is later than the checkpoint's step, {checkpoint.step}"
        yield Finding.warning("mixed saves", what)


def _about_plan(checkpoint: Checkpoint) -> Iterator[Finding]:
    plan, router = checkpoint.plan, checkpoint.router_reference
    if plan is None or router is None or router.ndim != 1:
        return
    owners = router_owners(router)
    fits = plan.router_map_len == len(owners) and plan.num_experts == checkpoint.num_experts
    addresses = as_addresses(plan.addresses, len(owners))
    if not fits or addresses is None or (owners[addresses] != plan.parent).any():
        what = "the planned split does not fit the checkpoint"
        hint = "plan the split again with arc_meta"
        yield Finding.warning("plan", what, hint=hint)


def _floats(value: object, place: str) -> Iterator[tuple[str, float]]:
    """Yield the non-finite floats inside a plain value, but only the first of each list."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _floats(entry, f"{place}.{key}")
    elif isinstance(value, list | tuple) and set(map(type, value)) <= {int, float}:
        # There may be millions of numbers. The difference of a number and itself is 0 unless it is not finite.
        yield from islice(((f"{place}[{i}]", each) for i, each in enumerate(value) if each - each), 1)
    elif isinstance(value, list | tuple):
        found = (each for i, entry in enumerate(value) for each in _floats(entry, f"{place}[{i}]"))
        yield from islice(found, 1)


def about_values(checkpoint: Checkpoint, findings: list[Finding]) -> tuple[int, int]:
    """Report non-finite and impossible values of tensors. Return the number of tensors, and their bytes."""
    optimizer = checkpoint.optimizer
    held: dict[str, object] = {"payload": checkpoint.payload.references()}
    if optimizer is not None:
        groups = referenced([group.options for group in optimizer.groups])
        held["optimizer"] = {
            "state": optimizer.state.references(),
            "groups": groups,
            **optimizer.extra.references(),
        }
    elif (unbound := unbound_state_dict(checkpoint)) is not None:
        held["optimizer"] = unbound.references()
    named = [*checkpoint.open_references().items(), *named_references(held)]
    for place, number in _floats(held, ""):
        where = place.removeprefix(".")
        findings.append(Finding.warning("finite", f"is {number}", where=where))
    total = size_of([tensor for _, tensor in named])
    with progress.progress_bar("values", total) as advance:
        for name, tensor in named:
            if not is_finite(tensor):
                values = value_facts(tensor.read_only_tensor())
                kinds = ((values.nans, "NaN"), (values.infinities, "infinite"))
                what = " and ".join(f"{number} {kind}" for number, kind in kinds if number)
                what = f"{what} of {tensor.numel()} elements"
                findings.append(Finding.warning("finite", what, where=name))
            negative = count_negative(tensor.read_only_tensor()) if is_never_negative(name, tensor) else 0
            if negative:
                what = f"{negative} of {tensor.numel()} elements are negative, but this slot cannot be negative"
                findings.append(Finding.warning("negative", what, where=name))
            advance(tensor.nbytes)
    return len(named), total
