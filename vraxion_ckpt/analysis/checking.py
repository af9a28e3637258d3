"""Is a checkpoint sound? Every finding at once, instead of the first error.

What a reader refuses is an error; so is what no runtime loads, and what a manifest contradicts. A warning is what loads
and is probably not meant; a note is what one should know.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, Unpack

from vraxion_ckpt.analysis.findings import Finding, Severity
from vraxion_ckpt.analysis.inspection import value_facts
from vraxion_ckpt.analysis.optimizer_findings import about_optimizer, count_negative, is_never_negative
from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.expert_health import HOW_TO_RESTORE, is_finite, is_zero
from vraxion_ckpt.checkpoint.invariants import router_owners
from vraxion_ckpt.checkpoint.model import Checkpoint, HeadKind, Origin, unbound_state_dict
from vraxion_ckpt.checkpoint.plain_data import named_tensors, size_of
from vraxion_ckpt.commit import manifest as manifests
from vraxion_ckpt.commit.staging import was_interrupted
from vraxion_ckpt.errors import BindingError, CkptError, CkptWarning, SourceError, memory_errors
from vraxion_ckpt.experts import companions
from vraxion_ckpt.optimizer import placement
from vraxion_ckpt.optimizer.parameter_order import explain
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter, Faults
from vraxion_ckpt.reading.opening import (
    PathLike,
    bound_if_possible,
    check_allowed,
    detect_source,
    files_of,
    os_errors_named,
)
from vraxion_ckpt.reading.read_options import ReadKeywords, ReadOptions
from vraxion_ckpt.support import progress
from vraxion_ckpt.support.json_models import Facts
from vraxion_ckpt.wording import count, listed, numbered, shortened


class Checked(Facts):
    """Whether a checkpoint is sound, and everything that was found."""

    kind_of_facts: ClassVar[str] = "check"

    path: Path
    format: str
    sound: bool
    """Whether no finding is an error."""
    findings: tuple[Finding, ...]
    """Errors first."""
    files: int
    tensors: int
    """How many were read and looked at, optimizer slots and tensors of the payload included."""
    bytes: int
    manifest: Path | None
    """What its files were compared with."""


@memory_errors()
def check(
    path: PathLike,
    *,
    manifest: PathLike | None = None,
    **reading: Unpack[ReadKeywords],
) -> Checked:
    """Read all of a checkpoint and return every finding: files, checksums, invariants, values.

    Args:
        path: a file or a directory.
        manifest: a file that ``convert`` or ``edit`` wrote with ``--manifest``: digests of every file.
        reading: what the files do not tell, see `ReadOptions`.

    Raises:
        UsageError: there is no such file, or no such manifest.
        UnknownFormatError: it is of no known format.
    """
    options = ReadOptions(**reading)
    with os_errors_named(path):
        root = Path(path)
        adapter = detect_source(root, options.from_)
        check_allowed(adapter, options.allow_globals)
        listed = manifests.load_manifest(Path(manifest)) if manifest is not None else None
        findings: list[Finding] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CkptWarning)
            checkpoint, tensors, size = _examine(adapter, root, findings, options)
        told = dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, CkptWarning))
        findings += [Finding.warning("readable", text) for text in told]
        origin = checkpoint.origin if checkpoint is not None else Origin()
        root = origin.path or root
        files = files_of(adapter, root, origin.leftovers)
        findings += _about_files(adapter, root, files)
        if listed is not None:
            findings += [
                Finding.error("manifest", what, where=root.name if name == manifests.SELF else name)
                for name, what in manifests.compare_manifest(listed, root, files)
            ]
    order = list(Severity)
    findings.sort(key=lambda finding: order.index(finding.severity))
    return Checked(
        path=root,
        format=adapter.name,
        sound=not any(finding.severity is Severity.ERROR for finding in findings),
        findings=tuple(findings),
        files=len(files),
        tensors=tensors,
        bytes=size,
        manifest=Path(manifest) if manifest is not None else None,
    )


def _examine(
    adapter: Adapter,
    root: Path,
    findings: list[Finding],
    options: ReadOptions,
) -> tuple[Checkpoint | None, int, int]:
    """Read everything and judge it; return the checkpoint, how many tensors were looked at, and their bytes."""
    faults = Faults()
    tensors = size = 0
    checkpoint = adapter_calls.examine(adapter, root, faults, options.allow_globals)
    if checkpoint is not None:
        for expert in checkpoint.head.experts.values() if checkpoint.head else ():
            faults.attempt(partial(getattr, expert, "tensors"))
        _verify(checkpoint, faults)
        bound, refused = bound_if_possible(checkpoint, options)
        findings += _about_binding(checkpoint, bound, refused)
        findings += _about_contents(bound)
        tensors, size = _about_values(bound, findings)
        faults.attempt(checkpoint.sources.check_unchanged)
    findings += [_finding("readable", error) for error in faults.errors]
    return checkpoint, tensors, size


def _finding(rule: str, error: CkptError, severity: Severity = Severity.ERROR) -> Finding:
    return Finding(severity=severity, rule=rule, what=error.message, where=error.where, hint=error.hint)


def _verify(checkpoint: Checkpoint, faults: Faults) -> None:
    sources = [source for source in checkpoint.sources if source.verify is not None]
    with progress.progress_bar("checksums", sum(source.fingerprint.size for source in sources)) as count:
        for source in sources:
            assert source.verify is not None
            faults.attempt(source.verify)
            count(source.fingerprint.size)


# --- what a checkpoint holds ---


def _about_binding(
    checkpoint: Checkpoint, bound: Checkpoint, refused: BindingError | SourceError | None
) -> Iterator[Finding]:
    """Judge the names of parameters, and why the optimizer was refused, unless they tell that already."""
    named = list(_about_names(checkpoint))
    yield from named
    if isinstance(refused, SourceError):
        yield _finding("binding", refused)
    elif refused is not None and not named:
        inferred = not any(listed for _, listed in _name_lists(bound))
        yield _finding("binding", refused, Severity.WARNING if inferred else Severity.ERROR)


def _about_contents(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Judge a checkpoint as far as its tensors' shapes and everything else tell."""
    yield from _about_memory(checkpoint)
    for line in invariants.invariant_findings(checkpoint):
        yield Finding.error("invariant", line)
    yield from _about_lacking(checkpoint)
    head_is_open = checkpoint.head is None or all(expert.is_open for expert in checkpoint.head.experts.values())
    if head_is_open:
        yield from _about_order(checkpoint)
    for companion in companions.stale_companions(checkpoint) if head_is_open else ():
        what = f"{companion.problem}: it has not followed a change of the head"
        yield Finding.warning("companion", what, where=str(companion))
    head = checkpoint.head
    if head is None:
        yield Finding.note("head", "the model has no head that could be split")
    elif head.kind is HeadKind.EXPERTS and head.num_experts == 1:
        yield Finding.error(
            "one head",
            "a runtime with one head expects head.single, and skips head.experts.0 without a word",
            hint="let mitosis_split or experts_to_single follow",
        )
    yield from _about_zeros(checkpoint)
    yield from _about_ring(checkpoint)
    yield from _about_step(checkpoint)
    yield from _about_rows(checkpoint)
    yield from _about_plan(checkpoint)
    yield from about_optimizer(checkpoint)


def _about_lacking(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Name parameters of experts that the optimizer lacks, or how many, where it is not known which."""
    lacking = list(placement.missing_parameters(checkpoint))
    hint = "convert --optimizer complete adds what is lacking, without state; if the expert is frozen, nothing is wrong"
    what = "the optimizer does not list this parameter, although it lists those of other experts"
    if lacking and placement.is_undecided_in_head(checkpoint):
        what = f"the optimizer lacks {count(len(lacking), 'parameter')} of experts; it cannot be told which"
        lacking = ["optimizer"]
        hint = f"give the names of those that it has: --param-names FILE; {hint}"
    for name in lacking:
        yield Finding.warning("trained alike", what, where=name, hint=hint)


def _about_order(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Tell what is not known of an optimizer, which a chain would have to know."""
    optimizer = checkpoint.optimizer
    if optimizer is None or checkpoint.head is None:
        return
    hint = "a chain that changes the head needs --param-names, --optimizer-order or --result-order"
    if optimizer.undecided:
        names = sorted(optimizer.undecided)
        what = f"{count(len(names), 'name')} could belong to other ids: {listed(names, 4)}"
        yield Finding.note("binding", what, where="optimizer", hint=hint)
    elif not (optimizer.rules if optimizer.rules is not None else explain(optimizer, checkpoint)):
        what = "no rule explains the order in which it lists its parameters"
        yield Finding.warning("order", what, where="optimizer", hint=hint)


def _name_lists(checkpoint: Checkpoint) -> list[tuple[str, tuple[str, ...]]]:
    """Return what lists parameters by name, and the lists."""
    raw = unbound_state_dict(checkpoint) or {}
    groups = [name for group in raw.get("param_groups", []) for name in group.get("param_names", ())]
    bound = checkpoint.optimizer.params if checkpoint.optimizer else []
    return [
        ("param_names", checkpoint.param_names or ()),
        ("the optimizer's groups", tuple(map(str, groups or bound))),
    ]


def _about_names(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Hold the lists of parameters to the model, and to each other."""
    head = checkpoint.head
    known = set(checkpoint.open_tensors())
    lists = _name_lists(checkpoint)
    for where, names in lists:
        lacking = [n for n in names if n not in known and not (head is not None and head.is_not_at_hand(n))]
        if lacking:
            what = f"the model lacks {listed(lacking, 4)}"
            yield Finding.error("names", what, where=where)
    (_, model), (_, optimizer) = lists
    both = set(model) & set(optimizer)
    if [n for n in model if n in both] != [n for n in optimizer if n in both]:
        what = "the optimizer's groups list parameters in another order than param_names does"
        yield Finding.warning("names", what, where="param_names")


def _about_memory(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Name tensors that share memory: a training step updates all of them."""
    slots = {
        f"{name}.{slot}"
        for name, entries in (checkpoint.optimizer.state if checkpoint.optimizer else {}).items()
        for slot in entries
    }
    for tie in invariants.shared_names(checkpoint):
        what = f"{listed(tie, 4)} share memory"
        if slots.intersection(tie):
            hint = "give each a copy of its own: the first training step updates all of them"
            yield Finding.error("shared memory", what, hint=hint)
        elif any(not name.startswith("payload.") for name in tie):
            yield Finding.warning("shared memory", f"{what}: tied, and trained as one")


def _about_ring(checkpoint: Checkpoint) -> Iterator[Finding]:
    head, router = checkpoint.head, checkpoint.router_map
    if head is None:
        return
    if router is None:
        yield Finding.note("ring", "the model has no router_map")
        return
    if router.ndim != 1 or router.is_floating_point() or router.is_complex():
        return  # told as an invariant
    owning = set(router_owners(router).tolist())
    idle = [i for i in head.experts if i not in owning]
    if idle:
        what = f"no address belongs to {numbered('expert', idle)}: nothing is routed there"
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
        what = f"the row of {numbered('expert', late)} is of a later step than the checkpoint's, {checkpoint.step}"
        yield Finding.warning("mixed saves", what)


def _about_plan(checkpoint: Checkpoint) -> Iterator[Finding]:
    plan, router = checkpoint.plan, checkpoint.router_map
    if plan is None or router is None or router.ndim != 1:
        return
    owners = router_owners(router)
    fits = plan.router_map_len == len(owners) and plan.num_experts == checkpoint.num_experts
    if not fits or any(not 0 <= a < len(owners) or owners[a] != plan.parent for a in plan.addresses):
        what = "the planned split does not fit the checkpoint any more"
        hint = "plan again with arc_meta"
        yield Finding.warning("plan", what, hint=hint)


def _floats(value: object, place: str) -> Iterator[tuple[str, float]]:
    """Yield every number inside a plain value that is not finite, of a list only the first."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _floats(entry, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        found = (each for i, entry in enumerate(value) for each in _floats(entry, f"{place}[{i}]"))
        yield from islice(found, 1)


def _about_values(checkpoint: Checkpoint, findings: list[Finding]) -> tuple[int, int]:
    """Read every tensor and tell where it is not finite; return how many there are, and their bytes."""
    optimizer = checkpoint.optimizer
    held: dict[str, object] = {"payload": checkpoint.payload}
    if optimizer is not None:
        groups = [group.options for group in optimizer.groups]
        held["optimizer"] = {"state": optimizer.state, "groups": groups, **optimizer.extra}
    elif (unbound := unbound_state_dict(checkpoint)) is not None:
        held["optimizer"] = unbound
    named = [*checkpoint.open_tensors().items(), *named_tensors(held)]
    for place, number in _floats(held, ""):
        where = place.removeprefix(".")
        findings.append(Finding.warning("finite", f"is {number}", where=where))
    total = size_of([tensor for _, tensor in named])
    with progress.progress_bar("values", total) as count:
        for name, tensor in named:
            if not is_finite(tensor):
                values = value_facts(tensor)
                kinds = ((values.nans, "NaN"), (values.infinities, "infinite"))
                what = " and ".join(f"{number} {kind}" for number, kind in kinds if number)
                what = f"{what} of {tensor.numel()} elements"
                findings.append(Finding.warning("finite", what, where=name))
            negative = count_negative(tensor) if is_never_negative(name, tensor) else 0
            if negative:
                what = f"{negative} of {tensor.numel()} elements are negative, of which none can be"
                findings.append(Finding.warning("negative", what, where=name))
            count(tensor.numel() * tensor.itemsize)
    return len(named), total


# --- files ---


def _about_files(adapter: Adapter, root: Path, files: Sequence[Path]) -> Iterator[Finding]:
    real = Path(os.path.realpath(root))
    if was_interrupted(real):
        yield Finding.error(
            "interrupted edit",
            "an edit of it was killed halfway",
            where=str(root),
            hint=f"`vraxion-ckpt edit {root}` takes it back, or finishes it",
        )
    foreign = (adapter_calls.foreign_files(adapter, root) or []) if root.is_dir() else []
    others = [path for path in foreign if path.is_file() and path not in files]
    if others:
        names = listed([path.relative_to(root) for path in others], 4)
        yield Finding.note("foreign files", f"the directory holds {count(len(others), 'other file')}: {names}")
