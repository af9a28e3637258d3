"""YAML as we read it, strictly: plain data, every key once, and the line that each entry stands in.

Imports nothing of torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vraxion_ckpt.errors import StorageError, UsageError

_LARGEST = 2**20  # bytes; whoever writes one by hand stays below
_PLAIN = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))

# Where something stands: keys and indices from the top.
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong at a place; on no line, if it is not in the file."""

    place: Place
    what: str
    line: int | None = None

    def __str__(self) -> str:
        line = f"line {self.line}: " if self.line is not None else ""
        return f"{line}{spell(self.place)}: {self.what}" if self.place else f"{line}{self.what}"


def spell(place: Place) -> str:
    """Return a place for people: ``chain[1].arc_meta.visits``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


@dataclass
class Yaml:
    """A file's content, where each entry stands, and what is wrong with it as YAML."""

    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def line(self, place: Place) -> int | None:
        """Return the line of an entry, or that of the nearest one around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place)


def load(path: Path) -> Yaml:
    """Read a file of one YAML document, without running or expanding anything.

    Raises:
        UsageError: there is no such file, it is too large, not UTF-8, or not YAML at all.
        StorageError: the file cannot be read.
    """
    if not path.is_file():
        raise UsageError("no such file", path=path)
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"is larger than {_LARGEST} bytes", path=path)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    except UnicodeDecodeError as error:
        raise UsageError("is not UTF-8 text", path=path) from error
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):  # a dozen lines of those can stand for a billion entries
                line = event.start_mark.line + 1 if event.start_mark else 0
                raise UsageError(f"line {line}: aliases (*name) are not known here", path=path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(_syntax(error), path=path) from None
    found = Yaml()
    found.value = _value(node, (), found)
    return found


def scalar(text: str) -> Any:
    """Return the value that a text has as a plain YAML scalar: ``3``, ``0.5``, ``true``, or itself."""
    found = Yaml()
    node = yaml.compose(text, Loader=yaml.SafeLoader) if text.strip() else None
    value = _value(node, (), found) if isinstance(node, yaml.ScalarNode) else text
    return text if found.problems else value


def _syntax(error: BaseException) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"is no YAML: line {error.problem_mark.line + 1}: {error.problem}"
    return "is no YAML: it is nested too deeply" if isinstance(error, RecursionError) else f"is no YAML: {error}"


def _value(node: yaml.Node | None, place: Place, found: Yaml) -> Any:
    if node is None:
        return None
    line = node.start_mark.line + 1
    found.lines.setdefault(place, line)
    if node.tag == "tag:yaml.org,2002:timestamp":
        return node.value
    if node.tag not in _PLAIN:
        found.problems.append(Problem(place, f"the tag {node.tag} is not known here", line))
        return None
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, place, found)
    if isinstance(node, yaml.SequenceNode):
        return [_value(entry, (*place, i), found) for i, entry in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, yaml.YAMLError) as error:
        found.problems.append(Problem(place, f"cannot be read: {error}", line))
        return None


def _mapping(node: yaml.MappingNode, place: Place, found: Yaml) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
            found.problems.append(Problem(place, "a key must be plain text", line))
            continue
        key = str(key_node.value)
        if key in entries:
            found.problems.append(Problem((*place, key), "the key occurs twice", line))
        found.lines[(*place, key)] = line
        entries[key] = _value(value_node, (*place, key), found)
    return entries
