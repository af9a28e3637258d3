"""What the commands print: facts as plain data, and the same facts for people."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from itertools import groupby, islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vraxion_ckpt import plugins as plugin_registry
from vraxion_ckpt import ring
from vraxion_ckpt.inplace import Edited, EditKind
from vraxion_ckpt.invariants import router_owners
from vraxion_ckpt.model import Checkpoint, Optimizer
from vraxion_ckpt.plugins import Registered
from vraxion_ckpt.reading import Inspection
from vraxion_ckpt.ring import Ints
from vraxion_ckpt.summary import Summary

_Line = tuple[str, str | Text]

_MOST_ROWS = 16
_OWNER_SIGNS = "0123456789abcdefghijklmnopqrstuvwxyz"
# Colours of the 256-colour palette that black text can be read on.
_OWNER_COLOURS = (75, 215, 114, 211, 180, 147, 80, 221, 174, 151, 117, 218)


def console() -> Console:
    """Return the console for data; no colours off a terminal, or with NO_COLOR."""
    return Console(highlight=False)


def size(number: int) -> str:
    """Return a number of bytes for people."""
    value, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def band(owners: Ints, width: int) -> Text:
    """Draw a ring as one line: a cell for each address, or for each equal share of them, the commonest owner's sign."""
    shown = [Counter(cell.tolist()).most_common(1)[0][0] for cell in np.array_split(owners, min(width, len(owners)))]
    text = Text()
    for owner, cells in groupby(shown):
        colour = Style(color="black", bgcolor=f"color({_OWNER_COLOURS[owner % len(_OWNER_COLOURS)]})")
        text.append(_OWNER_SIGNS[owner % len(_OWNER_SIGNS)] * len(list(cells)), colour)
    return text


# --- convert, edit ---

_HOW = {
    EditKind.NOTHING: "nothing to change",
    EditKind.REPLACE: "replace: the file, by a rename",
    EditKind.ROUTER_ONLY: "router only: one file, by a rename",
    EditKind.GROW: "grow: new files first, then the router",
    EditKind.SHRINK: "shrink: the router first, then what it no longer names",
    EditKind.REWRITE: "rewrite: a whole new directory, exchanged with the old one",
}


def summary_facts(done: Summary) -> dict[str, Any]:
    """Return a conversion's summary as plain data."""
    facts = dataclasses.asdict(done)
    facts["losses"] = [str(loss) for loss in done.losses]
    facts["side_files"] = [str(path) for path in done.side_files]
    return {"schema": "vraxion-ckpt/convert/1", **facts, "source": str(done.source), "target": str(done.target)}


def edit_facts(done: Edited) -> dict[str, Any]:
    """Return an edit's summary as plain data."""
    facts = {**summary_facts(done), "schema": "vraxion-ckpt/edit/1", "path": str(done.target)}
    facts["kept"] = None if done.kept is None else str(done.kept)
    return {key: fact for key, fact in facts.items() if key not in ("source", "target", "source_format")}


def summary(done: Summary, *, verbose: bool = False) -> None:
    """Print a conversion's summary, a fact a line."""
    lines: list[_Line] = [
        ("would write" if done.dry_run else "wrote", f"{done.target} ({done.target_format})"),
        ("from", f"{done.source} ({done.source_format})"),
        *_what_became(done),
    ]
    if not done.dry_run:
        lines.append(("size", f"{size(done.bytes_written)} in {done.seconds:.1f} s"))
    _print_lines([*lines, *(_steps(done) if verbose else [])])


def edited(done: Edited, *, verbose: bool = False) -> None:
    """Print an edit's summary, a fact a line."""
    where = f"{done.target} ({done.target_format})"
    if done.kind is EditKind.NOTHING:
        _print_lines([("unchanged", where), ("how", _HOW[done.kind])])
        return
    edited, wrote, removed = (
        ("would edit", "would write", "would remove") if done.dry_run else ("edited", "wrote", "removed")
    )
    lines: list[_Line] = [(edited, where), ("how", _HOW[done.kind])]
    files = [(wrote, done.written), (removed, done.removed)]
    lines += [(what, _listed(names)) for what, names in files if names and names != (".",)]
    if done.untouched:
        lines.append(("untouched", f"{done.untouched} file{'s' * (done.untouched != 1)}"))
    if done.kept is not None:
        lines.append(("kept", f"the previous state, as {done.kept}"))
    lines += _what_became(done)
    how_long = "to write" if done.dry_run else f"in {done.seconds:.1f} s"
    lines.append(("size", f"{size(done.bytes_written)} {how_long}"))
    _print_lines([*lines, *(_steps(done) if verbose else [])])


def _what_became(done: Summary) -> list[_Line]:
    tensors = ", ".join(f"{n} {what}" for what, n in dataclasses.asdict(done.tensors).items() if n) or "none"
    lines: list[_Line] = [
        ("experts", f"{done.experts_before} → {done.experts_after}, {done.addresses_moved} addresses moved"),
        ("tensors", tensors),
        ("optimizer", done.optimizer),
    ]
    if done.function_preserved is not None:
        lines.append(("function", f"preserved per address: {done.function_preserved}"))
    lines += [("lost", str(loss)) for loss in done.losses]
    lines += [("also", str(path)) for path in done.side_files]
    return lines


def _steps(done: Summary) -> list[_Line]:
    return [("step", f"{r.name} ({r.distribution} {r.version}): {r.summary}") for r in done.history]


def _listed(names: tuple[str, ...], most: int = 8) -> str:
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _print_lines(lines: list[_Line]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in lines:
        table.add_row(label, value if isinstance(value, Text) else Text(value))
    console().print(table)


# --- inspect ---


def inspection_facts(look: Inspection) -> dict[str, Any]:
    """Return what is known of a checkpoint as plain data; opens no more experts than are listed."""
    checkpoint = look.checkpoint
    router = checkpoint.router_map
    return {
        "schema": "vraxion-ckpt/inspect/1",
        "path": str(checkpoint.origin.path),
        "format": checkpoint.origin.format,
        "bytes_on_disk": sum(source.fingerprint.size for source in checkpoint.sources),
        "dialects": dict(checkpoint.origin.dialects),
        "step": checkpoint.payload.get("step"),
        "core": {"tensors": len(checkpoint.core), "bytes": _total_bytes(checkpoint.core)},
        "payload": list(checkpoint.payload),
        "head": str(checkpoint.head.kind) if checkpoint.head else None,
        "num_experts": checkpoint.num_experts,
        "deleted": sorted(checkpoint.head.deleted) if checkpoint.head else [],
        "experts": _expert_facts(checkpoint),
        "ring": _ring_facts(router_owners(router), checkpoint.num_experts) if router is not None else None,
        "optimizer": _optimizer_facts(checkpoint, look.binding_error),
        "plan": dataclasses.asdict(checkpoint.plan) if checkpoint.plan else None,
        "history": [dataclasses.asdict(record) for record in checkpoint.history],
        "losses": {name: [str(loss) for loss in losses] for name, losses in look.losses.items()},
    }


def _expert_facts(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    if checkpoint.head is None:
        return []
    facts = []
    for i, expert in islice(checkpoint.head.experts.items(), _MOST_ROWS):
        row = checkpoint.lifecycle.get(i)
        facts.append(
            {
                "id": i,
                "tensors": {leaf: _tensor_facts(tensor) for leaf, tensor in expert.items()},
                "bytes": _total_bytes(expert.tensors),
                "lifecycle": dataclasses.asdict(row) if row else None,
            }
        )
    return facts


def _tensor_facts(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _ring_facts(owners: Ints, num_experts: int) -> dict[str, Any]:
    counts = np.bincount(np.clip(owners, 0, None), minlength=num_experts)
    arcs = ring.runs(owners)
    return {
        "length": len(owners),
        "addresses_per_expert": counts.tolist(),
        "runs": len(arcs),
        "owners": owners.tolist() if len(owners) <= 4096 else None,
    }


def _optimizer_facts(checkpoint: Checkpoint, error: str | None) -> dict[str, Any] | None:
    if error is not None:
        return {"bound": False, "why": error}
    optimizer = checkpoint.optimizer
    if optimizer is None:
        return None
    slots = sorted({slot for slots in optimizer.state.values() for slot in slots}, key=str)
    return {
        "bound": True,
        "how": optimizer.bound_by,
        "parameters": len(optimizer.params),
        "with_state": len(optimizer.state),
        "slots": slots,
        "bytes": _slot_bytes(optimizer),
        "groups": [{"params": len(g.params), **_plain_options(g.options)} for g in optimizer.groups],
    }


def _slot_bytes(optimizer: Optimizer) -> int:
    values = (value for slots in optimizer.state.values() for value in slots.values())
    return sum(value.numel() * value.itemsize for value in values if isinstance(value, Tensor))


def _plain_options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in options.items()}


def inspection(facts: dict[str, Any]) -> None:
    """Print what is known of a checkpoint."""
    out = console()
    step = facts["step"]
    lines: list[_Line] = [
        ("path", facts["path"]),
        ("format", f"{facts['format']}, {size(facts['bytes_on_disk'])} on disk"),
        ("step", "none" if step is None else str(step)),
        ("core", f"{facts['core']['tensors']} tensors, {size(facts['core']['bytes'])}"),
        ("head", _head_in_words(facts)),
    ]
    if facts["ring"]:
        runs = facts["ring"]["runs"]
        lines.append(("ring", f"{facts['ring']['length']} addresses, {runs} run{'s' * (runs != 1)} of one owner"))
        if facts["ring"]["owners"]:
            lines.append(("", band(np.asarray(facts["ring"]["owners"]), out.width - 12)))
    lines.append(("optimizer", _optimizer_in_words(facts["optimizer"])))
    if facts["plan"]:
        plan = facts["plan"]
        lines.append(("plan", f"expert {plan['parent']} gives up {len(plan['addresses'])} addresses"))
    for record in facts["history"]:
        lines.append(("history", f"{record['name']} on {record['source'] or '?'}: {record['summary']}"))
    for name, losses in facts["losses"].items():
        lines.append((f"as {name}", f"would lose {'; '.join(losses) or 'nothing'}"))
    _print_lines(lines)
    if facts["experts"]:
        out.print(_expert_table(facts))


def _total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Sum the sizes of tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def _short(number: float) -> str:
    return f"{number:g}" if abs(number) < 10**15 else "huge"


def _head_in_words(facts: dict[str, Any]) -> str:
    if facts["head"] is None:
        return "none"
    if facts["head"] == "single":
        return "single (head.single.*): put single_to_experts before a first split"
    deleted = f", deleted: {', '.join(map(str, facts['deleted']))}" if facts["deleted"] else ""
    return f"{facts['num_experts']} experts (head.experts.*){deleted}"


def _optimizer_in_words(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return "none"
    if not facts["bound"]:
        return f"NOT BOUND to names: {facts['why']}"
    slots = ", ".join(map(str, facts["slots"])) or "no slots"
    groups = len(facts["groups"])
    return (
        f"{facts['parameters']} parameters in {groups} group{'s' * (groups != 1)}, {facts['with_state']} with state "
        f"({slots}), {size(facts['bytes'])}; bound by {facts['how']}"
    )


def _expert_table(facts: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("expert", no_wrap=True)
    for heading in ("owns", "share", "bytes", "contrib", "created", "used"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("tensors", overflow="fold")
    counts = facts["ring"]["addresses_per_expert"] if facts["ring"] else []
    total = sum(counts) or 1
    for expert in facts["experts"]:
        owned = counts[expert["id"]] if expert["id"] < len(counts) else 0
        row = expert["lifecycle"] or {}
        shapes = ", ".join(f"{leaf} {t['shape']}" for leaf, t in islice(expert["tensors"].items(), 4))
        table.add_row(
            f"{expert['id']}{' tenured' * bool(row.get('tenured'))}",
            str(owned),
            f"{owned / total:.1%}",
            size(expert["bytes"]),
            _short(row.get("contrib", 0)),
            str(row.get("created_step", "")),
            str(row.get("last_used_step", "")),
            Text(shapes),
        )
    for i in facts["deleted"][:_MOST_ROWS]:
        owned = counts[i] if i < len(counts) else 0
        table.add_row(f"{i} deleted", str(owned), f"{owned / total:.1%}", *["–"] * 4, "")
    more = facts["num_experts"] - len(facts["deleted"]) - len(facts["experts"])
    if more:
        table.add_row("…", f"{more} more", *[""] * 6)
    return table


# --- plugins, describe ---


def plugin_facts() -> dict[str, Any]:
    """Return every format and transform, what is broken, and which names clash."""
    found = plugin_registry.registry()
    kinds: list[tuple[str, dict[str, list[Registered[Any]]]]] = [
        ("format", found.adapters),
        ("transform", found.transforms),
    ]
    entries = [
        {
            "name": name,
            "kind": kind,
            "distribution": offer.distribution,
            "version": offer.version,
            "entry_point": offer.entry_point,
            "summary": offer.plugin.summary(),
            "clash": len(offers) > 1,
        }
        for kind, names in kinds
        for name, offers in sorted(names.items())
        for offer in offers
    ]
    entries += [
        {
            "name": hook.plugin_name.partition(":")[2],
            "kind": "probe",
            "distribution": hook.plugin_name.partition(":")[0],
            "version": "",
            "entry_point": hook.plugin_name.partition(":")[2],
            "summary": (hook.function.__doc__ or "").strip().split("\n")[0],
            "clash": False,
        }
        for hook in found.manager.hook.probe_visits.get_hookimpls()
    ]
    return {
        "schema": "vraxion-ckpt/plugins/1",
        "plugins": entries,
        "broken": [dataclasses.asdict(broken) for broken in found.broken],
    }


def plugins(facts: dict[str, Any]) -> None:
    """Print what is installed."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("name", "kind", "from", "what it does"):
        table.add_column(heading, overflow="fold")
    for entry in facts["plugins"]:
        note = "CLASHES, cannot be used: " if entry["clash"] else ""
        origin = f"{entry['distribution']} {entry['version']}".rstrip()
        table.add_row(entry["name"], entry["kind"], origin, Text(note + entry["summary"]))
    for broken in facts["broken"]:
        table.add_row(broken["entry_point"], "BROKEN", broken["distribution"], Text(broken["reason"]))
    console().print(table)


def description_facts(name: str) -> dict[str, Any]:
    """Return the options of one format or transform.

    Raises:
        UsageError: there is none of that name.
    """
    found = plugin_registry.registry()
    names: dict[str, list[Registered[Any]]] = {**found.adapters, **found.transforms}
    registered = plugin_registry.find(names, name, "plugin")
    plugin = registered.plugin
    schemas = plugin.model_json_schema().get("properties", {}).values()
    options = [
        {
            "name": key,
            "type": _type_in_words(schema),
            "required": field.is_required(),
            "default": None if field.is_required() else field.default,
            "description": field.description or "",
        }
        for (key, field), schema in zip(plugin.model_fields.items(), schemas, strict=True)
    ]
    return {
        "schema": "vraxion-ckpt/describe/1",
        "name": name,
        "distribution": registered.distribution,
        "version": registered.version,
        "summary": plugin.summary(),
        "options": options,
        "json_schema": plugin.model_json_schema(),
    }


def _type_in_words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type_in_words(s) for s in schema["anyOf"] if s.get("type") != "null")
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_type_in_words(schema.get('items', {}))}"
    words = {"integer": "whole number", "number": "number", "boolean": "true | false"}
    kind = schema.get("format") if schema.get("format") == "path" else schema.get("type", "anything")
    return words.get(str(kind), str(kind).replace("string", "text"))


def description(facts: dict[str, Any]) -> None:
    """Print the options of one plugin."""
    out = console()
    out.print(Text(f"{facts['name']}  ({facts['distribution']} {facts['version']})", style="bold"))
    out.print(Text(facts["summary"]))
    if not facts["options"]:
        out.print("no options")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("option", "type", "default", "meaning"):
        table.add_column(heading, overflow="fold")
    for option in facts["options"]:
        default = "required" if option["required"] else _default_in_words(option["default"])
        table.add_row(option["name"], Text(option["type"]), Text(default), Text(option["description"]))
    out.print(table)


def _default_in_words(value: Any) -> str:
    if value is None or value == ():
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)
