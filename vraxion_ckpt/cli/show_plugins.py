"""Print plugins and their options."""

from __future__ import annotations

from rich.text import Text

from vraxion_ckpt.cli.terminal import put, put_table
from vraxion_ckpt.plugins.catalogue import Description, OptionEntry, PluginList


def print_plugins(facts: PluginList) -> None:
    """Print every format, transform and probe, and the plugins that cannot be loaded."""
    rows: list[tuple[str | Text, ...]] = []
    for entry in facts.plugins:
        note = "NAME USED TWICE, cannot be used: " if entry.clash else ""
        origin = f"{entry.distribution} {entry.version}".rstrip()
        rows.append((entry.name, entry.kind, origin, Text(note + entry.summary)))
    for broken in facts.broken:
        rows.append((broken.entry_point, "BROKEN", broken.distribution, Text(broken.reason)))
    put_table(("name", "kind", "from", "what it does"), rows)


def print_description(facts: Description) -> None:
    """Print a plugin's summary and options."""
    put(Text(f"{facts.name}  ({facts.distribution} {facts.version})", style="bold"))
    put(Text(facts.summary))
    if not facts.options:
        put(Text("\nno options"))
        return
    rows = [
        (option.name, Text(option.type), Text(_default(option)), Text(option.description)) for option in facts.options
    ]
    put("")
    put_table(("option", "type", "default", "meaning"), rows)


def _default(option: OptionEntry) -> str:
    if option.required:
        return "required"
    if option.default is None or option.default == ():
        return "not set"
    return str(option.default).lower() if isinstance(option.default, bool) else str(option.default)
