"""Generate the reference part of the manual from the code, with one directive for each page."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import vraxion_ckpt
from vraxion_ckpt import errors
from vraxion_ckpt.cli import schemas
from vraxion_ckpt.plugins import hookspecs
from vraxion_ckpt.plugins.catalogue import OptionEntry, describe_plugin, list_plugins
from vraxion_ckpt.recipes import recipe_model

OURS = "vraxion-ckpt"
SCHEMA_FOLDER = "schemas"


class Generated(SphinxDirective):
    """Insert reStructuredText that a function writes."""

    source: ClassVar[Callable[[], Iterable[str]]]

    def run(self) -> list[nodes.Node]:
        text = "\n".join(type(self).source())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


# --- plugins ---


def plugins() -> Iterator[str]:
    """Write every built-in format, transform and probe, with its options."""
    for kind, title in (("format", "Formats"), ("transform", "Transforms"), ("probe", "Probes")):
        yield from heading(title, "=")
        for entry in list_plugins().plugins:
            if entry.kind != kind or entry.distribution != OURS:
                continue
            yield from heading(entry.name, "-")
            yield from (entry.summary, "")
            if kind != "probe":
                yield from options(describe_plugin(entry.name).options)


def options(entries: Sequence[OptionEntry]) -> Iterator[str]:
    """Write a table of options."""
    if not entries:
        yield from ("No options.", "")
        return
    rows = []
    for option in entries:
        default = "required" if option.required else "–" if option.default in (None, ()) else code(option.default)
        rows.append((code(option.name), option.type, default, option.description))
    yield from table(("option", "type", "default", "meaning"), rows, widths=(20, 22, 16, 42))


# --- hooks ---


def hooks() -> Iterator[str]:
    """Write every hook: its signature, its docstring, and how its results are used."""
    for name, function in vars(hookspecs).items():
        spec = getattr(function, f"{hookspecs.GROUP}_spec", None)
        if spec is None:
            continue
        signature = str(inspect.signature(function)).replace("'", "")
        yield from (f".. py:function:: {name}{signature}", "")
        yield from indented(inspect.cleandoc(function.__doc__ or "").splitlines())
        called = (
            "Implementations are called one after the other until one returns something other than None."
            if spec["firstresult"]
            else "The results of all implementations are combined."
        )
        yield from indented(("", called, ""))


# --- errors ---


def error_table() -> Iterator[str]:
    """Write every class of error with its exit code, in the order of the tree."""
    rows = [
        (str(kind.exit_code), code(kind.__name__), code(base.__name__), first_paragraph(kind))
        for kind, base in tree(errors.CkptError)
        if kind.exit_code != errors.CkptError.exit_code
    ]
    yield from table(("exit code", "class", "is a", "what is wrong"), rows, widths=(12, 26, 20, 42))


def tree(base: type[errors.CkptError]) -> Iterator[tuple[type[errors.CkptError], type[errors.CkptError]]]:
    """Yield every subclass of an error class, with its base class."""
    for kind in base.__subclasses__():
        yield kind, base
        yield from tree(kind)


# --- schemas ---


def all_schemas() -> dict[str, dict[str, Any]]:
    """Return every JSON Schema by its name."""
    return {**{name: schemas.schema_of(name) for name in schemas.SCHEMAS}, "recipe": recipe_model.json_schema()}


def schema_sections() -> Iterator[str]:
    """Write the entries of every JSON document, and a link to its schema."""
    for name, schema in all_schemas().items():
        yield from heading(name, "=")
        yield from (about(schema), "")
        yield from (f"``{schema['$id']}``, `{name}.json <{SCHEMA_FOLDER}/{name}.json>`__", "")
        yield from properties(schema)
        for part, inner in schema.get("$defs", {}).items():
            if inner.get("properties"):
                yield from (f".. rubric:: {part}", "", about(inner), "")
                yield from properties(inner)


def about(schema: dict[str, Any]) -> str:
    """Return a schema's description of the whole object."""
    return plain(schema.get("description", "").partition("\n\nAttributes:")[0])


def properties(schema: dict[str, Any]) -> Iterator[str]:
    """Write a table of an object's entries. Meanings come from the entries, or from the object's docstring."""
    _, _, attributes = schema.get("description", "").partition("\n\nAttributes:")
    meanings = dict(re.findall(r"^    (\w+): (.+(?:\n     .+)*)", attributes, re.MULTILINE))
    rows = [
        (code(name), plain(type_in_words(entry)), plain(entry.get("description", meanings.get(name, ""))))
        for name, entry in schema.get("properties", {}).items()
    ]
    yield from table(("entry", "type", "meaning"), rows, widths=(25, 30, 45))


def type_in_words(schema: dict[str, Any]) -> str:
    """Describe the type of a value."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(type_in_words(each) for each in schema[several]))
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return ", ".join(map(json.dumps, schema["enum"]))
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(type_in_words(each) for each in schema['prefixItems'])}]"
        return f"array of {type_in_words(schema.get('items', {}))}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {type_in_words(schema['additionalProperties'])}"
    return str(schema.get("type", "anything"))


def write_schemas(app: Sphinx, problem: Exception | None) -> None:
    """Write the schemas next to the pages that link to them."""
    if problem is None and app.builder.format == "html":
        folder = Path(app.outdir) / "reference" / SCHEMA_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for name, schema in all_schemas().items():
            (folder / f"{name}.json").write_text(json.dumps(schema, indent=2) + "\n")


# --- the Python API ---


def api() -> Iterator[str]:
    """Write every public name, functions first."""
    public = {name: getattr(vraxion_ckpt, name) for name in vraxion_ckpt.__all__}
    yield from heading("Functions", "=")
    for name, value in public.items():
        if inspect.isfunction(value):
            yield from (f".. autofunction:: vraxion_ckpt.{name}", "")
    yield from heading("Classes", "=")
    for name, value in public.items():
        if inspect.isclass(value):
            yield from (f".. autoclass:: vraxion_ckpt.{name}", "   :members:", "")


# --- corrections to other extensions ---


def close_brackets(_app: Sphinx, _context: click.Context, lines: list[str]) -> None:
    """Restore the bracket that sphinx-click cuts off the end of ``F[:k=v]``."""
    lines[:] = [re.sub(r"<([^>]*\[[^\]>]*)>", r"<\1]>", line) for line in lines]


def keep_underscores(_app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Escape the underscore of ``from_``, which reStructuredText would read as a link."""
    lines[:] = [re.sub(r"^(:param \w+)_:", r"\1\\_:", line) for line in lines]


def close_factories(
    _app: Sphinx, _what: str, _name: str, _obj: object, _options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Replace ``<factory>``, the default of a dataclass's dict, because it is not valid Python."""
    return signature and signature.replace("<factory>", "..."), returns


# --- reStructuredText ---


def heading(title: str, line: str) -> tuple[str, ...]:
    """Write a heading."""
    return ("", title, line * len(title), "")


def code(value: object) -> str:
    """Write a value as code."""
    return f"``{str(value).lower() if isinstance(value, bool) else value}``"


def plain(words: str) -> str:
    """Escape text and put it on one line; single backticks mark code, as in docstrings."""
    return " ".join(words.split()).replace("*", r"\*").replace("|", r"\|")


def first_paragraph(described: type) -> str:
    """Return the first paragraph of a docstring, in one line."""
    return " ".join(inspect.cleandoc(described.__doc__ or "").partition("\n\n")[0].split())


def table(header: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    """Write a table."""
    yield from (
        ".. list-table::",
        "   :header-rows: 1",
        "   :width: 100%",
        f"   :widths: {' '.join(map(str, widths))}",
        "",
    )
    for row in (header, *rows):
        yield f"   * - {row[0]}"
        yield from (f"     - {cell}" for cell in row[1:])
    yield ""


def indented(lines: Iterable[str]) -> Iterator[str]:
    """Indent lines as the content of a directive."""
    return (f"   {line}" if line else "" for line in lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register a directive for each page."""
    pages: dict[str, Callable[[], Iterable[str]]] = {
        "vraxion-plugins": plugins,
        "vraxion-hooks": hooks,
        "vraxion-errors": error_table,
        "vraxion-schemas": schema_sections,
        "vraxion-api": api,
    }
    for name, source in pages.items():
        app.add_directive(name, type(name, (Generated,), {"source": staticmethod(source)}))
    app.connect("build-finished", write_schemas)
    app.connect("sphinx-click-process-options", close_brackets)
    app.connect("autodoc-process-signature", close_factories)
    app.connect("autodoc-process-docstring", keep_underscores, priority=600)  # after napoleon
    return {"parallel_read_safe": True}
