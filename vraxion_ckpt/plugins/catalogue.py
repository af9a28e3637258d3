"""List the installed formats, transforms and probes, and describe the options of one."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic.fields import FieldInfo

from vraxion_ckpt.plugins import discovery
from vraxion_ckpt.plugins.discovery import Broken, Registered
from vraxion_ckpt.plugins.options import calling
from vraxion_ckpt.support.json_models import Fact, Facts, Plain


class PluginEntry(Fact):
    """One plugin."""

    name: str
    kind: str
    """``format``, ``transform`` or ``probe``."""
    distribution: str
    """The package that provides the plugin."""
    version: str
    entry_point: str
    summary: str
    clash: bool
    """Whether another plugin has the same name. In this case neither can be used."""


class PluginList(Facts):
    """Every installed format, transform and probe, and the plugins that could not be loaded."""

    kind_of_facts: ClassVar[str] = "plugins"

    plugins: tuple[PluginEntry, ...]
    broken: tuple[Broken, ...]


class OptionEntry(Fact):
    """One option of a plugin."""

    name: str
    type: str
    """The type in words, such as ``list of whole number``."""
    required: bool
    default: Plain
    description: str


class Description(Facts):
    """The options of one format or transform."""

    kind_of_facts: ClassVar[str] = "describe"

    name: str
    distribution: str
    version: str
    summary: str
    options: tuple[OptionEntry, ...]
    json_schema: dict[str, Any]
    """The JSON Schema of the options."""


def list_plugins() -> PluginList:
    """Return every installed format, transform and probe, and the plugins that could not be loaded."""
    found = discovery.registry()
    kinds: list[tuple[str, dict[str, list[Registered[Any]]]]] = [
        ("format", found.adapters),
        ("transform", found.transforms),
    ]
    entries = [
        PluginEntry(
            name=name,
            kind=kind,
            distribution=offer.distribution,
            version=offer.version,
            entry_point=offer.entry_point,
            summary=offer.plugin.summary(),
            clash=len(offers) > 1,
        )
        for kind, names in kinds
        for name, offers in sorted(names.items())
        for offer in offers
    ]
    for hook in found.manager.hook.probe_visits.get_hookimpls():
        distribution, _, entry_point = hook.plugin_name.partition(":")
        entries.append(
            PluginEntry(
                name=entry_point,
                kind="probe",
                distribution=distribution,
                version="",
                entry_point=entry_point,
                summary=(hook.function.__doc__ or "").strip().split("\n")[0],
                clash=False,
            )
        )
    return PluginList(plugins=tuple(entries), broken=tuple(found.broken))


def describe_plugin(name: str) -> Description:
    """Return the options of one format or transform.

    Raises:
        UsageError: no plugin has this name.
    """
    found = discovery.registry()
    names: dict[str, list[Registered[Any]]] = {**found.adapters, **found.transforms}
    registered = discovery.find_plugin(names, name, "plugin")
    plugin = registered.plugin
    with calling(plugin):
        schemas = plugin.model_json_schema().get("properties", {}).values()
    options = tuple(
        OptionEntry(
            name=key,
            type=_type_in_words(schema),
            required=field.is_required(),
            default=None if field.is_required() else _default(field, schema),
            description=field.description or "",
        )
        for (key, field), schema in zip(plugin.model_fields.items(), schemas, strict=True)
    )
    return Description(
        name=name,
        distribution=registered.distribution,
        version=registered.version,
        summary=plugin.summary(),
        options=options,
        json_schema=plugin.model_json_schema(),
    )


def _default(field: FieldInfo, schema: dict[str, Any]) -> Any:
    """Return the default of an option. If it is None, return the default in the schema, such as ``auto``."""
    return schema.get("default") if field.default is None else field.default


def _type_in_words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type_in_words(s) for s in schema["anyOf"] if s.get("type") != "null")
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_type_in_words(schema.get('items', {}))}"
    words = {"integer": "whole number", "number": "number", "boolean": "true | false"}
    kind = schema.get("format") if schema.get("format") == "path" else schema.get("type", "anything")
    return words.get(str(kind), str(kind).replace("string", "text"))
