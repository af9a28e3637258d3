"""Read YAML strictly: plain data without duplicate keys, with the line number of each entry.

Plain scalars follow the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), without octal and
hexadecimal numbers: ``0001``, ``1:30``, ``yes`` and ``0x10`` are text. Imports without torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vraxion_ckpt.errors import LimitError, UsageError
from vraxion_ckpt.support import text_files

_LARGEST = 2**20  # bytes
_DEEPEST = 50
_MOST_ENTRIES = 20_000  # keys, values and lists; PyYAML takes a second for so many
_MOST_SHOWN = 200  # characters of a place in a message
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]{1,3})?")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    written: value
    for value, word in ((True, "true"), (False, "false"))
    for written in (word, word.title(), word.upper())
}

# The keys and indices that lead to an entry.
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """A problem with an entry. `line` is None if the entry is not in the file."""

    place: Place
    what: str
    line: int | None = None

    def __str__(self) -> str:
        line = f"line {self.line}: " if self.line is not None else ""
        return f"{line}{place_text(self.place)}: {self.what}" if self.place else f"{line}{self.what}"


def place_text(place: Place) -> str:
    """Return a place as text, like ``chain[1].arc_meta.visits``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    text = text.removeprefix(".")
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "…"


@dataclass
class Yaml:
    """The content of a YAML file.

    Attributes:
        value: the content as plain data.
        lines: the line number of each entry.
        texts: each scalar as written in the file.
        problems: the entries that are not allowed, such as duplicate keys.
    """

    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    texts: dict[Place, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def line(self, place: Place) -> int | None:
        """Return the line of an entry; if it is not in the file, the line of the entry that would hold it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place)


def load(path: Path) -> Yaml:
    """Read a file with one YAML document. No code is run.

    Raises:
        UsageError: the file does not exist, is not a regular file, is too large, is not YAML in UTF-8, or has aliases.
        StorageError: the file cannot be read.
    """
    try:
        text = text_files.read_text(path, most=_LARGEST, encoding="utf-8-sig")
    except LimitError as error:
        raise UsageError(error.message, path=path) from error
    except UnicodeDecodeError as error:
        raise UsageError("is not UTF-8 text", path=path) from error
    try:
        _check_events(text, path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(_syntax(error), path=path) from None
    found = Yaml()
    found.value = _value(node, (), found)
    return found


def scalar(text: str) -> Any:
    """Return the value of a plain scalar: a number, True, False, None, or the text itself.

    Raises:
        ValueError: the number is not finite.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if text.lower().lstrip("+-") in (".inf", ".nan"):
        raise ValueError(f"{text} is not a finite number")
    if _FLOAT.fullmatch(text) and any(letter.isdigit() for letter in text):
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{text} is not a finite number")
        return number
    return text


def _check_events(text: str, path: Path) -> None:
    """Reject documents that would take too much time or memory to compose."""
    depth = entries = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):  # a dozen lines with aliases can expand to a billion entries
            raise UsageError(f"line {line}: aliases (*name) are not supported", path=path)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise UsageError(f"line {line}: is nested too deeply", path=path)
        entries += isinstance(event, yaml.NodeEvent)
        if entries > _MOST_ENTRIES:
            raise UsageError(f"line {line}: there are more than {_MOST_ENTRIES} entries", path=path)


def _syntax(error: BaseException) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"is not YAML: line {error.problem_mark.line + 1}: {error.problem}"
    return "is not YAML: it is nested too deeply" if isinstance(error, RecursionError) else f"is not YAML: {error}"


def _value(node: yaml.Node | None, place: Place, found: Yaml) -> Any:
    if node is None:
        return None
    line = node.start_mark.line + 1
    found.lines.setdefault(place, line)
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _mapping(node, place, found)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_value(entry, (*place, i), found) for i, entry in enumerate(node.value)]
    if not isinstance(node, yaml.ScalarNode) or not _has_default_tag(node):
        found.problems.append(Problem(place, f"the tag {node.tag} is not supported", line))
        return None
    found.texts[place] = str(node.value)
    if node.style is not None:  # quoted, or a block
        return str(node.value)
    try:
        return scalar(node.value)
    except ValueError as error:
        found.problems.append(Problem(place, str(error), line))
        return None


def _has_default_tag(node: yaml.ScalarNode) -> bool:
    """Tell whether a scalar has the tag that PyYAML derives from its text, and no other."""
    plain = node.style is None
    return bool(node.tag == yaml.SafeLoader("").resolve(yaml.ScalarNode, node.value, (plain, not plain)))  # type: ignore[no-untyped-call]


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
