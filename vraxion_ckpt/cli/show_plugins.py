"""Plugins and their options, as tables."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from vraxion_ckpt.cli.terminal import put, table_of
from vraxion_ckpt.plugins.catalogue import Description, PluginList


def print_plugins(facts: PluginList) -> None:
    """Print what is installed."""
    table = table_of("name", "kind", "from", "what it does")
    for entry in facts.plugins:
        note = "CLASHES, cannot be used: " if entry.clash else ""
        origin = f"{entry.distribution} {entry.version}".rstrip()
        table.add_row(entry.name, entry.kind, origin, Text(note + entry.summary))
    for broken in facts.broken:
        table.add_row(broken.entry_point, "BROKEN", broken.distribution, Text(broken.reason))
    put(table)


def print_description(facts: Description) -> None:
    """Print the options of one plugin."""
    put(Text(f"{facts.name}  ({facts.distribution} {facts.version})", style="bold"))
    put(Text(facts.summary))
    if not facts.options:
        put(Text("no options"))
        return
    table = table_of("option", "type", "default", "meaning")
    for option in facts.options:
        default = "required" if option.required else _default_in_words(option.default)
        table.add_row(option.name, Text(option.type), Text(default), Text(option.description))
    put(table)


def _default_in_words(value: Any) -> str:
    if value is None or value == ():
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)
