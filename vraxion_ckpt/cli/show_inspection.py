"""What a checkpoint is and holds, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from vraxion_ckpt.analysis.inspection import ExpertFacts, Inspection, OptimizerFacts, RingFacts, TensorFacts, TensorTree
from vraxion_ckpt.checkpoint.load_balance import Balance, ExpertLoads
from vraxion_ckpt.checkpoint.model import HeadKind
from vraxion_ckpt.cli.terminal import MOST_ROWS, Line, band, byte_size, console, print_lines, put, table_of
from vraxion_ckpt.wording import count, listed

_MOST_BRANCHES = 24


def print_inspection(facts: Inspection) -> None:
    """Print what is known of a checkpoint."""
    files = f" in {facts.files} files" if facts.files > 1 else ""
    lines: list[Line] = [
        ("path", str(facts.path)),
        ("format", f"{facts.format}, {byte_size(facts.bytes_on_disk)} on disk{files}"),
        *([("dialect", facts.dialect)] if facts.dialect else []),
        ("step", "none" if facts.step is None else str(facts.step)),
        ("core", f"{count(facts.core.tensors, 'tensor')}, {byte_size(facts.core.bytes)}"),
        ("payload", listed(facts.payload) or "nothing else"),
        ("head", _head_in_words(facts)),
        *_ring_lines(facts.ring, max(1, console().width - 13)),
        *optimizer_lines(facts.optimizer),
    ]
    if facts.plan:
        note = f" ({facts.plan.note})" if facts.plan.note else ""
        given = count(len(facts.plan.addresses), "address")
        lines.append(("plan", f"expert {facts.plan.parent} gives up {given}{note}"))
    lines += [("history", f"{record.name} on {record.source or '?'}: {record.summary}") for record in facts.history]
    for name, losses in facts.losses.items():
        lines.append((f"as {name}", f"would lose {'; '.join(map(str, losses)) or 'nothing'}"))
    print_lines(lines)
    if facts.experts:
        put(_expert_table(facts.experts))
    if facts.signs:
        put(_signs_table(facts.signs))
    if facts.tensors:
        _print_tree(facts.tensors)


def _head_in_words(facts: Inspection) -> str:
    if facts.head is None:
        return "none"
    if facts.head is HeadKind.SINGLE:
        return "single (head.single.*): put single_to_experts before a first split"
    deleted = [expert.id for expert in facts.experts if expert.deleted]
    gone = f", deleted: {listed(deleted)}" if deleted else ""
    return f"{count(facts.num_experts, 'expert')} (head.experts.*){gone}"


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
    """Return what is known of an optimizer: what it holds, its groups, and how it is bound."""
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
    for group in optimizer.groups[:MOST_ROWS]:
        lines.append(("group", f"{count(group.params, 'parameter')}, {_options_in_words(group.options)}"))
    if len(optimizer.groups) > MOST_ROWS:
        lines.append(("", f"… {len(optimizer.groups) - MOST_ROWS} more groups"))
    if optimizer.bound:
        lines.append(("bound by", optimizer.how))
        lines.append(("order", optimizer.order or "explained by no rule, or by several"))
    else:
        lines.append(("NOT BOUND", Text(optimizer.how, style="yellow")))
    return lines


def _options_in_words(options: Mapping[str, Any]) -> str:
    """Name a group's options that are set; the flags that are off say nothing."""
    told = [f"{key} {value}" for key, value in options.items() if value is not None and value is not False]
    return ", ".join(told) or "no options"


def _expert_table(experts: tuple[ExpertFacts, ...]) -> Table:
    table = table_of("expert", "owns", "share", "bytes", "contrib", "created", "used", "tensors")
    for column in table.columns[1:-1]:
        column.justify, column.no_wrap = "right", True
    table.columns[0].no_wrap = True
    for expert in experts[:MOST_ROWS]:
        row = expert.lifecycle
        shapes = [f"{leaf} {list(t.shape)}" for leaf, t in (expert.tensors or {}).items()]
        marks = " tenured" * bool(row and row.tenured) + " deleted" * expert.deleted + " zero" * bool(expert.zero)
        marks += " collected" * bool(row and row.collected)
        table.add_row(
            f"{expert.id}{marks}",
            "–" if expert.addresses is None else str(expert.addresses),
            "–" if expert.share is None else f"{expert.share:.1%}",
            "–" if expert.bytes is None else byte_size(expert.bytes),
            _short(row.contrib) if row else "–",
            str(row.created_step) if row else "–",
            str(row.last_used_step) if row else "–",
            Text(listed(shapes, 4)),
        )
    if len(experts) > MOST_ROWS:
        table.add_row("…", f"{len(experts) - MOST_ROWS} more", *[""] * 6)
    return table


def _short(number: float) -> str:
    return f"{number:g}" if abs(number) < 10**15 else "huge"


def _signs_table(signs: ExpertLoads) -> Table:
    table = table_of("visits", "ptr_expert_max_share", "entropy", "active", "of expert")
    rows = (("before", signs.before), ("predicted", signs.predicted), ("measured", signs.measured))
    for name, load in rows:
        table.add_row(name, *(_load_cells(load) if load else ("–", "–", "–", "not known")))
    return table


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
            put(tree)


def _nested(named: Mapping[str, TensorFacts]) -> dict[str, Any]:
    """Return tensors by the parts of their names; a name may also be the beginning of another."""
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
        while len(entry) == 1 and isinstance(next(iter(entry.values())), dict):  # a chain of names is one line
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
