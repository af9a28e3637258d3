"""Print the result of `inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.text import Text
from rich.tree import Tree

from vraxion_ckpt.analysis.inspection_facts import (
    ExpertFacts,
    Inspection,
    NeighbourFacts,
    OptimizerFacts,
    RingFacts,
    UnknownExperts,
)
from vraxion_ckpt.analysis.tensor_facts import TensorFacts, TensorTree
from vraxion_ckpt.checkpoint.head import HeadKind
from vraxion_ckpt.checkpoint.load_balance import Balance, ExpertLoads
from vraxion_ckpt.checkpoint.optimizer_state import OptimizerForm
from vraxion_ckpt.cli.terminal import (
    MOST_ROWS,
    Line,
    band,
    byte_size,
    console,
    print_lines,
    put,
    put_section,
    put_table,
    style_of,
)
from vraxion_ckpt.plugins.adapter import Loss
from vraxion_ckpt.wording import count, listed

_MOST_BRANCHES = 24


def print_inspection(facts: Inspection) -> None:
    """Print the facts about a checkpoint: labelled lines, then a section for each table."""
    files = f" in {facts.files} files" if facts.files > 1 else ""
    lines: list[Line] = [
        ("path", str(facts.path)),
        ("format", f"{facts.format}, {byte_size(facts.bytes_on_disk)} on disk{files}"),
        *([("dialect", facts.dialect)] if facts.dialect else []),
        *_neighbour_lines(facts.neighbours),
        ("step", "none" if facts.step is None else str(facts.step)),
        ("core", f"{count(facts.core.tensors, 'tensor')}, {byte_size(facts.core.bytes)}"),
        ("payload", listed(facts.payload) or "nothing else"),
        ("head", _head_in_words(facts)),
        *_unknown_lines(facts.unknown_experts),
        *_ring_lines(facts.ring, max(1, console().width - 13)),
        *optimizer_lines(facts.optimizer),
    ]
    if facts.plan:
        note = f" ({facts.plan.note})" if facts.plan.note else ""
        given = count(len(facts.plan.addresses), "address")
        lines.append(("plan", f"expert {facts.plan.parent} gives up {given}{note}"))
    lines += [("history", f"{record.name} on {record.source or '?'}: {record.summary}") for record in facts.history]
    print_lines([*lines, *_loss_lines(facts.losses)])
    if facts.experts:
        _print_experts(facts.experts)
    if facts.signs:
        _print_loads(facts.signs)
    if facts.tensors:
        _print_tree(facts.tensors)


def _neighbour_lines(neighbours: Mapping[str, NeighbourFacts]) -> list[Line]:
    """Return a line for the files beside the weights, and one for those that hold more than a description."""
    unread = [f"{name} ({found.holds})" for name, found in neighbours.items() if found.holds]
    others = [name for name, found in neighbours.items() if not found.holds]
    lines: list[Line] = [("beside", listed(others, 12))] if others else []
    return [*lines, *([("not read", Text(listed(unread, 12), style="yellow"))] if unread else [])]


def _head_in_words(facts: Inspection) -> str:
    if facts.head is None:
        return "none in a known layout" if facts.unknown_experts else "none"
    if facts.head is HeadKind.SINGLE:
        return "single (head.single.*): run single_to_experts before the first split"
    deleted = [expert.id for expert in facts.experts if expert.deleted]
    gone = f", deleted: {listed(deleted)}" if deleted else ""
    return f"{count(facts.num_experts, 'expert')} (head.experts.*){gone}"


def _unknown_lines(unknown: UnknownExperts | None) -> list[Line]:
    if unknown is None:
        return []
    held = f"{count(unknown.tensors, 'tensor')} with names like {unknown.example}"
    handled = "treated as ordinary tensors; transforms cannot split or merge them"
    return [("experts", Text(f"not in a known layout: {held}; {handled}", style="yellow"))]


def _loss_lines(losses: Mapping[str, Sequence[Loss]]) -> list[Line]:
    """Return one line for the formats that lose nothing, and a line for each other format."""
    lossless = [name for name, lost in losses.items() if not lost]
    lines: list[Line] = [("would lose", f"nothing as {_alternatives(lossless)}")] if lossless else []
    for name, lost in losses.items():
        if lost:
            lines.append(("" if lines else "would lose", f"as {name}: {'; '.join(map(str, lost))}"))
    return lines


def _alternatives(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _ring_lines(ring: RingFacts | None, width: int) -> list[Line]:
    if ring is None:
        return [("ring", "none")]
    arcs = f"{count(ring.arcs, 'arc')} of one owner"
    longest = f", the longest of {ring.longest_arc}" if ring.arcs > 1 else ""
    lines: list[Line] = [("ring", f"{count(ring.length, 'address')}, {arcs}{longest}")]
    if ring.owners:
        lines.append(("", band(np.asarray(ring.owners), width)))
    return lines


def optimizer_lines(optimizer: OptimizerFacts | None) -> list[Line]:
    """Return lines that describe an optimizer: state, groups, and how it is bound to parameter names."""
    if optimizer is None:
        return [("optimizer", "none")]
    slots = ", ".join(optimizer.slots) or "no slots"
    lines: list[Line] = [
        (
            "optimizer",
            f"{count(optimizer.parameters, 'parameter')}, {optimizer.with_state} with state ({slots}), "
            f"{byte_size(optimizer.bytes)}",
        )
    ]
    for part in optimizer.parts:
        if part.place or part.form is not OptimizerForm.NUMBERED:
            place = ".".join(map(str, part.place)) or "the usual place"
            lines.append(("held in", f"{place}, {part.form}: {count(part.parameters, 'parameter')}"))
    for group in optimizer.groups[:MOST_ROWS]:
        lines.append(("group", f"{count(group.params, 'parameter')}, {_options_in_words(group.options)}"))
    if len(optimizer.groups) > MOST_ROWS:
        lines.append(("", f"… {len(optimizer.groups) - MOST_ROWS} more groups"))
    if optimizer.bound:
        lines.append(("bound by", optimizer.how))
        by_name = all(part.form is not OptimizerForm.NUMBERED for part in optimizer.parts)
        unknown = "has no effect: loaded by name" if by_name else "follows no known rule, or several"
        lines.append(("order", optimizer.order or unknown))
    else:
        lines.append(("NOT BOUND", Text(optimizer.how, style="yellow")))
    return lines


def _options_in_words(options: Mapping[str, Any]) -> str:
    """Return a group's options, except those that are None or False."""
    parts = [f"{key} {value}" for key, value in options.items() if value is not None and value is not False]
    return ", ".join(parts) or "no options"


def _print_experts(experts: tuple[ExpertFacts, ...]) -> None:
    rows = []
    for expert in experts[:MOST_ROWS]:
        row = expert.lifecycle
        shapes = [f"{leaf} {list(t.shape)}" for leaf, t in (expert.tensors or {}).items()]
        marks = " tenured" * bool(row and row.tenured) + " deleted" * expert.deleted + " zero" * bool(expert.zero)
        marks += " collected" * bool(row and row.collected)
        rows.append(
            (
                Text.assemble((str(expert.id), style_of(expert.id)), marks),
                "–" if expert.addresses is None else str(expert.addresses),
                "–" if expert.share is None else f"{expert.share:.1%}",
                "–" if expert.bytes is None else byte_size(expert.bytes),
                _short(row.contrib) if row else "–",
                str(row.created_step) if row else "–",
                str(row.last_used_step) if row else "–",
                Text(listed(shapes, 4)),
            )
        )
    headings = ("expert", "owns", "share", "bytes", "contrib", "created", "used", "tensors")
    put_section("experts")
    put_table(headings, rows, numbers=range(1, 7))
    if len(experts) > MOST_ROWS:
        put(f"… {len(experts) - MOST_ROWS} more, see --json")


def _short(number: float) -> str:
    return f"{number:g}" if abs(number) < 10**15 else "huge"


def _print_loads(signs: ExpertLoads) -> None:
    loads = (("before", signs.before), ("predicted", signs.predicted), ("measured", signs.measured))
    rows = [(name, *(_load_cells(load) if load else ("–", "–", "–", "not known"))) for name, load in loads]
    put_section("visits")
    put_table(("load", "ptr_expert_max_share", "entropy", "active", "busiest expert"), rows)


def _load_cells(load: Balance) -> tuple[str, str, str, str]:
    busiest = load.shares.index(max(load.shares, default=0.0)) if load.shares else 0
    return f"{load.max_share:.1%}", f"{load.entropy:.3f}", f"{load.active} of {len(load.shares)}", str(busiest)


# --- the tree of tensors ---


def _print_tree(tensors: TensorTree) -> None:
    for title, named in (("model", tensors.model), ("optimizer", tensors.optimizer), ("payload", tensors.payload)):
        if named:
            total = sum(tensor.bytes for tensor in named.values())
            heading = f"{title}: {count(len(named), 'tensor')}, {byte_size(total)}"
            tree = Tree(Text(heading, style="bold"), guide_style="dim")
            _grow(tree, _nested(named))
            put("", tree)


def _nested(named: Mapping[str, TensorFacts]) -> dict[str, Any]:
    """Return the tensors as nested dicts, keyed by the parts of their names.

    Keys of modules end in a dot, because a tensor may have the same name as a module.
    """
    root: dict[str, Any] = {}
    for name, tensor in named.items():
        module = root
        parameter, colon, slot = name.partition(":")
        *path, leaf = [*parameter.split("."), *([slot] if colon else [])]
        for part in path:
            module = module.setdefault(f"{part}.", {})
        module[leaf] = tensor
    return root


def _grow(tree: Tree, module: dict[str, Any]) -> None:
    for place, (name, entry) in enumerate(module.items()):
        if place == _MOST_BRANCHES and len(module) > _MOST_BRANCHES + 1:
            tree.add(Text(f"… {len(module) - place} more, see --json", style="dim"))
            break
        if isinstance(entry, TensorFacts):
            tree.add(_leaf(name, entry))
            continue
        while len(entry) == 1 and isinstance(next(iter(entry.values())), dict):  # a lone submodule shares the line
            (more, entry) = next(iter(entry.items()))
            name += more
        _grow(tree.add(Text(name.removesuffix("."))), entry)


def _leaf(name: str, tensor: TensorFacts) -> Text:
    line = Text.assemble(name, (f"  {tensor.dtype} {list(tensor.shape)}, {byte_size(tensor.bytes)}", "dim"))
    values = tensor.values
    if values is None:
        return line
    if values.minimum is not None and values.maximum is not None:
        line.append(f", {values.minimum:.4g} … {values.maximum:.4g}")
    for number, what in ((values.nans, "NaN"), (values.infinities, "infinite")):
        if number:
            line.append(f", {number} {what}", "bold red")
    return line
