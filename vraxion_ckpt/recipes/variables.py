"""Replace the variables of a recipe: ``${name}`` in any text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vraxion_ckpt.errors import UsageError
from vraxion_ckpt.plugins.options import parse_call
from vraxion_ckpt.support.yaml_files import Place, Problem, Yaml, scalar
from vraxion_ckpt.wording import did_you_mean

_VARIABLE = re.compile(r"\$\$(?=\{)|\$\{([^}]*)(\})?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FOLDER = "recipe_dir"
_MOST_TEXT = 2**20  # characters inserted by all uses together; variables that use each other grow exponentially
_MOST_PROBLEMS = 100  # for which a similar name is suggested


@dataclass(frozen=True)
class _Variable:
    """The value of a variable.

    Attributes:
        value: replaces a text that consists only of the variable.
        text: replaces the variable within a longer text; None if the value is null.
    """

    value: Any
    text: str | None


_FAULTY = _Variable(None, "")  # its definition is reported as a problem
_EMPTY = _Variable("", "")  # its use is reported as a problem


class Filling:
    """Replace the variables of a recipe, and add the problems found to it.

    The length of the inserted text is checked before the text is built, so that memory use is bounded.
    """

    def __init__(self, yaml: Yaml, settings: Mapping[str, str], folder: str) -> None:
        self._yaml = yaml
        self._settings = settings
        self._known = {_FOLDER: _Variable(folder, folder)}
        self._used: set[str] = set()
        self._left: int | None = _MOST_TEXT  # characters; None after the limit was exceeded

    def all(self) -> dict[str, Any]:
        """Return the recipe's content with its variables replaced."""
        content = dict(self._yaml.value)
        declared = content.pop("vars", None)
        self._declare(declared if isinstance(declared, dict) else {})
        filled = {key: self._fill(value, (key,)) for key, value in content.items()}
        if "vars" not in self._yaml.value:
            return filled
        for name in self._known.keys() - self._used - {_FOLDER}:
            self._note(("vars", name), "is not used")
        if isinstance(declared, dict):
            declared = {name: self._known[name].value for name in declared if name in self._known}
        return {"vars": declared, **filled}

    def _note(self, place: Place, what: str) -> None:
        line = self._yaml.line(place) if place[0] != "--set" else None
        self._yaml.problems.append(Problem(place, what, line))

    def _nearest(self, name: str, names: Mapping[str, Any]) -> str:
        near = did_you_mean(name, names) if len(self._yaml.problems) < _MOST_PROBLEMS else ""
        return f", {near}" if near else ""

    def _fits(self, name: str, text: str | None, place: Place) -> bool:
        """Subtract the length of a variable's text from the limit. Return False, and report it once, if exceeded."""
        if self._left is None:
            return False
        self._left -= len(text or "")
        if self._left >= 0:
            return True
        self._left = None
        self._note(place, f"with the variable {name!r}, variables insert more than {_MOST_TEXT} characters in total")
        return False

    def _declare(self, declared: dict[str, Any]) -> None:
        """Define the variables in order; values from the settings replace the defaults."""
        for name in self._settings.keys() - declared.keys():
            self._note(("--set", name), f"is not a variable of the recipe{self._nearest(name, declared)}")
        faulty = {problem.place for problem in self._yaml.problems}
        for name, value in declared.items():
            place: Place = ("vars", name)
            if name == _FOLDER or not _NAME.fullmatch(name):
                own = name == _FOLDER
                self._note(
                    place, "is reserved for the recipe's folder" if own else "must consist of letters, digits and _"
                )
            elif isinstance(value, dict | list):
                self._note(place, "must be a string, a number, true, false or null")
                self._known[name] = _FAULTY
            elif name in self._settings:
                self._known[name] = self._with_others(self._given(name), ("--set", name))
            elif place in faulty:
                self._known[name] = _FAULTY
            else:
                text = None if value is None else self._yaml.texts.get(place, str(value))
                self._known[name] = self._with_others(_Variable(value, text), place)

    def _given(self, name: str) -> _Variable:
        text = self._settings[name]
        if not isinstance(text, str):
            self._note(("--set", name), "must be a string, as on the command line")
            return _FAULTY
        if not self._fits(name, text, ("--set", name)):
            return _FAULTY
        try:
            return _Variable(scalar(text), text)
        except ValueError as error:
            self._note(("--set", name), str(error))
            return _FAULTY

    def _with_others(self, variable: _Variable, place: Place) -> _Variable:
        """Replace variables inside the definition of a variable; only earlier ones are allowed."""
        whole = self._whole(variable.value, place)
        if whole is not None:
            return whole
        value = self._fill(variable.value, place)
        return _Variable(value, value if isinstance(value, str) and value != variable.value else variable.text)

    def _whole(self, value: Any, place: Place) -> _Variable | None:
        """Return the variable if a text consists only of one, and count this use."""
        found = _VARIABLE.fullmatch(value) if isinstance(value, str) else None
        if found is None or not found[2] or found[1] not in self._known:
            return None
        self._used.add(found[1])
        variable = self._known[found[1]]
        return variable if self._fits(found[1], variable.text, place) else _EMPTY

    def _fill(self, value: Any, place: Place) -> Any:
        """Replace the variables in a value. A text that consists only of one takes its value, of any type."""
        if isinstance(value, dict):
            for key in value:
                if "${" in key:
                    self._note((*place, key), "a key must not contain a variable")
            return {key: self._fill(entry, (*place, key)) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._fill(entry, (*place, i)) for i, entry in enumerate(value)]
        if not isinstance(value, str):
            return value
        if not _is_utf8_without_nul(value):
            self._note(place, "contains NUL or characters that UTF-8 cannot encode")
            return ""
        if "${" not in value:
            return value
        if place[0] == "chain" and len(place) == 2:
            return self._fill_step(value, place)
        whole = self._whole(value, place)
        if whole is not None:
            return whole.value
        return _VARIABLE.sub(lambda found: self._text(found, place), value)

    def _fill_step(self, text: str, place: Place) -> Any:
        """Replace variables in each option separately, so that a comma in a variable does not start a new option."""
        try:
            name, options = parse_call(text)
        except UsageError as error:
            self._note(place, error.message)
            return text
        return {name: {key: self._fill(value, (*place, name)) for key, value in options.items()}}

    def _text(self, found: re.Match[str], place: Place) -> str:
        name = found[1]
        if name is None:
            return "$"
        if not found[2] or not _NAME.fullmatch(name):
            self._note(place, f"{found[0]!r} is not a variable; write $${{ for a literal ${{")
        elif name not in self._known and place[0] in ("vars", "--set") and name in self._yaml.value["vars"]:
            self._note(place, f"the variable {name!r} must be defined before its use")
        elif name not in self._known:
            self._note(place, f"there is no variable {name!r}{self._nearest(name, self._known)}")
        elif self._known[name].text is None:
            self._used.add(name)
            self._note(place, f"the variable {name!r} has no value: pass --set {name}=…")
        else:
            self._used.add(name)
            text = str(self._known[name].text)
            return text if self._fits(name, text, place) else ""
        return ""


def _is_utf8_without_nul(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8 and has no NUL. Escapes in YAML can produce both."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False
