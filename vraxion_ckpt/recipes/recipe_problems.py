"""Find every problem of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vraxion_ckpt.errors import CkptError, OptionError, UsageError
from vraxion_ckpt.plugins.discovery import TransformLike, registry, resolve_adapter, resolve_chain
from vraxion_ckpt.plugins.options import problems_with
from vraxion_ckpt.recipes.recipe_model import Recipe, mappings_with_key
from vraxion_ckpt.support.model_errors import Refusal, refusals
from vraxion_ckpt.support.yaml_files import Place, Problem, Yaml
from vraxion_ckpt.wording import count, listed

_T = TypeVar("_T")

_MOST_REPORTED = 100  # problems
_MOST_NUMBERS = 10_000_000  # in the lists of all steps together; a short range may expand to as many


def check_recipe(path: Path, yaml: Yaml, filled: dict[str, Any]) -> tuple[Recipe, tuple[TransformLike, ...]]:
    """Validate a recipe whose variables are replaced, and resolve its plugins.

    Args:
        path: the YAML file, for the error message.
        yaml: the parsed file, with the problems found so far.
        filled: its content with the variables replaced.

    Returns:
        The recipe and its chain.

    Raises:
        UsageError: the message lists every problem, one on each line.
    """
    faulty = {problem.place for problem in yaml.problems}  # later problems of the same entries are consequences
    problems: list[Problem] = []
    recipe = _validated(yaml, filled, problems)
    chain = _checked_chain(yaml, filled.get("chain"), problems)
    _check_formats(yaml, filled, problems)
    problems = [*yaml.problems, *(p for p in problems if not any(p.place[:n] in faulty for n in range(1, 9)))]
    if recipe is None or problems:
        ordered = sorted(dict.fromkeys(problems), key=lambda problem: problem.line or 0)
        raise UsageError(f"{path}: {count(len(ordered), 'problem')}\n  " + listed(ordered, _MOST_REPORTED, "\n  "))
    return recipe, chain


def _validated(yaml: Yaml, filled: dict[str, Any], problems: list[Problem]) -> Recipe | None:
    targets = filled.get("targets")
    if filled.get("manifest") is not None and isinstance(targets, list) and len(targets) > 1:
        what = "applies to a single target; give each target its own `manifest`"
        problems.append(Problem(("manifest",), what, yaml.line(("manifest",))))
    try:
        return Recipe.model_validate(filled)
    except ValidationError as error:
        found = (_from_refusal(yaml, refusal) for refusal in refusals(error, Recipe))
        problems += [problem for problem in found if problem is not None]
        return None


def _from_refusal(yaml: Yaml, refusal: Refusal) -> Problem | None:
    # For a union of text and mapping, pydantic inserts the name of the chosen branch into the place.
    place = tuple(part for part in refusal.place if part not in ("text", "entry"))
    what = refusal.what
    if refusal.kind == "extra_forbidden" and (homes := mappings_with_key(str(place[-1]))):
        what = f"is not known here; it is a key of {' and of '.join(homes)}"
    elif refusal.kind == "string_type" and place in (("source",), ("targets", place[-1])):
        what = "must be a string, or a mapping with `path`"
    elif refusal.kind == "missing" and place == ("targets",):
        what = "is required; to change a checkpoint in place, use `edit`"
    elif refusal.kind == "too_short":
        if yaml.value.get("targets"):
            return None  # the problems of the targets are reported already
        what = "must name at least one target; to change a checkpoint in place, use `edit`"
    return Problem(place, what, yaml.line(place))


def _checked_chain(yaml: Yaml, chain: Any, problems: list[Problem]) -> tuple[TransformLike, ...]:
    """Check every transform, and add a problem for each wrong option."""
    items: list[TransformLike] = []
    numbers = 0
    for i, entry in enumerate(chain if isinstance(chain, list) else ()):
        place: Place = ("chain", i)
        if isinstance(entry, str):
            items.append(entry)
        elif isinstance(entry, dict) and len(entry) == 1:
            (name, options) = next(iter(entry.items()))
            place = (*place, name)
            if options is not None and not isinstance(options, dict):
                problems.append(Problem(place, "must be a mapping of options", yaml.line(place)))
                continue
            given = {key: _as_text(value) for key, value in (options or {}).items()}
            items.append((name, given))
            wrong = _wrong_options(name, given)
            for key, what in wrong:
                inner = (*place, key) if key else place
                problems.append(Problem(inner, what, yaml.line(inner)))
            if wrong:
                continue
        else:
            what = "must be NAME, NAME:key=value, or NAME with a mapping of its options"
            problems.append(Problem(place, what, yaml.line(place)))
            continue
        numbers += _attempt(lambda: _numbers_in(items[-1]), place, yaml, problems) or 0
        if numbers > _MOST_NUMBERS:
            what = f"the lists of the chain hold more than {_MOST_NUMBERS} numbers in all"
            problems.append(Problem(place, what, yaml.line(place)))
            break
    return tuple(items)


def _numbers_in(item: TransformLike) -> int:
    """Resolve a step, and return the number of entries of its lists, whose ranges are expanded."""
    (step,) = resolve_chain([item])
    return sum(len(value) for _, value in step.transform if isinstance(value, tuple))


def _as_text(value: Any) -> Any:
    """Replace booleans by ``true`` and ``false``, so that pydantic does not accept them as numbers."""
    if isinstance(value, bool):
        return str(value).lower()
    return [_as_text(entry) for entry in value] if isinstance(value, list) else value


def _wrong_options(name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    offers = registry().transforms.get(name, [])
    return problems_with(offers[0].plugin, options) if len(offers) == 1 else []


def _attempt(resolve: Callable[[], _T], place: Place, yaml: Yaml, problems: list[Problem]) -> _T | None:
    try:
        return resolve()
    except CkptError as error:
        hint = f" ({error.hint})" if error.hint and not isinstance(error, OptionError) else ""
        problems.append(Problem(place, f"{error.message}{hint}", yaml.line(place)))
    return None


def _check_formats(yaml: Yaml, filled: Mapping[str, Any], problems: list[Problem]) -> None:
    """Check every format that the recipe names."""
    source, targets = filled.get("source"), filled.get("targets")
    named: list[tuple[Place, Any]] = [(("source", "from"), source.get("from") if isinstance(source, dict) else None)]
    for i, entry in enumerate(targets if isinstance(targets, list) else ()):
        named.append((("targets", i, "to"), entry.get("to") if isinstance(entry, dict) else None))
    for place, text in named:
        if isinstance(text, str):
            _attempt(partial(resolve_adapter, text), place, yaml, problems)
