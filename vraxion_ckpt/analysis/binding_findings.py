"""Check the binding of the optimizer to parameter names, and the lists of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vraxion_ckpt.analysis.findings import Finding, Severity
from vraxion_ckpt.checkpoint.model import Checkpoint, unbound_state_dict
from vraxion_ckpt.checkpoint.torch_optimizer import unknown_parameters
from vraxion_ckpt.errors import BindingError, CkptError, SourceError
from vraxion_ckpt.optimizer import placement
from vraxion_ckpt.optimizer.parameter_order import explain
from vraxion_ckpt.wording import count, listed


def finding_of(rule: str, error: CkptError, severity: Severity = Severity.ERROR) -> Finding:
    """Return the finding for an error."""
    return Finding(severity=severity, rule=rule, what=error.message, where=error.where, hint=error.hint)


def about_binding(
    checkpoint: Checkpoint, bound: Checkpoint, refused: BindingError | SourceError | None
) -> Iterator[Finding]:
    """Check the lists of parameter names. Without a finding, report why the optimizer could not be bound."""
    named = list(_about_names(checkpoint))
    yield from named
    if isinstance(refused, SourceError):
        yield finding_of("binding", refused)
    elif refused is not None and not named:
        inferred = not any(listed for _, listed in _name_lists(bound))
        yield finding_of("binding", refused, Severity.WARNING if inferred else Severity.ERROR)


def about_lacking(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Report parameters of experts that the optimizer lacks, or only their number if it is unknown which."""
    lacking = list(placement.missing_parameters(checkpoint))
    hint = "convert --optimizer complete adds it without state; if the expert is frozen, ignore this warning"
    what = "the optimizer lacks this parameter, but has the same parameter of other experts"
    if lacking and placement.is_undecided_in_head(checkpoint):
        what = f"the optimizer lacks {count(len(lacking), 'parameter')} of experts; the file does not record which"
        lacking = ["optimizer"]
        hint = f"name the parameters that it has with --param-names FILE; {hint}"
    for name in lacking:
        yield Finding.warning("trained alike", what, where=name, hint=hint)


def about_order(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Report unknown facts about the optimizer that a chain may need."""
    optimizer = checkpoint.optimizer
    if optimizer is None or checkpoint.head is None:
        return
    hint = "a chain that changes the head needs --param-names, --optimizer-order or --result-order"
    if optimizer.undecided:
        names = sorted(optimizer.undecided)
        what = f"{count(len(names), 'parameter name')} could belong to other ids: {listed(names, 4)}"
        yield Finding.note("binding", what, where="optimizer", hint=hint)
        return
    for one in optimizer.each_part():
        (part,) = one.parts
        if not part.is_by_name and not (part.rules if part.rules is not None else explain(one, checkpoint)):
            what = "no rule explains the order of its parameters"
            yield Finding.warning("order", what, where=str(part), hint=hint)


def _name_lists(checkpoint: Checkpoint) -> list[tuple[str, tuple[str, ...]]]:
    """Return each list of parameter names, with what it belongs to."""
    raw: Mapping[str, Any] = unbound_state_dict(checkpoint) or {}
    groups = [name for group in raw.get("param_groups", []) for name in group.get("param_names", ())]
    lists = [groups]
    if not groups and checkpoint.optimizer is not None:
        lists = [one.params for one in checkpoint.optimizer.each_part()]
    return [
        ("param_names", checkpoint.param_names or ()),
        *(("the optimizer's groups", tuple(map(str, names))) for names in lists),
    ]


def _about_names(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Compare the lists of parameter names with the model and with each other."""
    lists = _name_lists(checkpoint)
    for where, names in lists:
        if lacking := unknown_parameters(checkpoint, names):
            what = f"the model lacks {listed(lacking, 4)}"
            yield Finding.error("names", what, where=where)
    (_, model), *optimizers = lists
    for _, optimizer in optimizers:
        both = set(model) & set(optimizer)
        if [n for n in model if n in both] == [n for n in optimizer if n in both]:
            continue
        what = "the optimizer's groups list parameters in another order than param_names does"
        yield Finding.warning("names", what, where="param_names")
