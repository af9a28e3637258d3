"""Recipes: a conversion written down in YAML, with variables, and any number of targets.

What stands in one is what stands on the command line: the same names, types and texts. Everything that is wrong with
a recipe is told at once, each with its line, before anything is read or written.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vraxion_ckpt._version import __version__
from vraxion_ckpt.errors import CkptError, UsageError
from vraxion_ckpt.facts import Facts
from vraxion_ckpt.judging import LossPolicy
from vraxion_ckpt.model import Record
from vraxion_ckpt.options import problems_with
from vraxion_ckpt.pipeline import Target, convert_to_all
from vraxion_ckpt.plugins import TransformLike, registry, resolve_adapter, resolve_chain
from vraxion_ckpt.reading import OptimizerPolicy, PathLike
from vraxion_ckpt.summary import Summary
from vraxion_ckpt.yamlfile import Place, Problem, Yaml, load, scalar

SCHEMA = "vraxion-ckpt/recipe/1"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_VARIABLE = re.compile(r"\$(\$(?=\{)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
_FOLDER = "recipe_dir"

Scalar = str | int | float | bool | None


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True)


class Source(_Entry):
    """What is read; as a text, only its path."""

    path: str
    from_: str | None = Field(None, alias="from", description="its format, found from its content if not given")
    param_names: tuple[str, ...] | None = None
    """Every optimizer parameter's name in optimizer order."""
    optimizer: OptimizerPolicy = "keep"
    allow_globals: tuple[str, ...] = ()
    """Classes its pickle may use beside plain data, by full name."""


class Output(_Entry):
    """What is written; as a text, only its path."""

    path: str
    to: str | None = None
    """Its format, ``NAME`` or ``NAME:key=value``; follows from its name if not given."""
    losses: LossPolicy | None = None
    """What to do about what the format cannot hold; if not given, as the recipe says."""
    overwrite: bool = False
    manifest: str | None = None
    """A file for the digests of what was written."""


class Recipe(_Entry):
    """A conversion, written down."""

    schema_: Literal["vraxion-ckpt/recipe/1"] | None = Field(None, alias="schema", description="kind and version")
    vars: dict[str, Scalar] = {}
    """Variables and what they are if ``--set`` does not say otherwise; ``${name}`` stands for one in any text."""
    source: str | Source
    chain: tuple[Any, ...] = ()
    """Transforms, from left to right: ``NAME``, ``NAME:key=value``, or NAME with a mapping of its options."""
    targets: Annotated[tuple[str | Output, ...], Field(min_length=1)]
    losses: LossPolicy = "raise"
    """What to do about what a target's format cannot hold."""
    manifest: str | None = None
    """As that of the target, where there is only one."""


class Ran(Facts):
    """What a recipe did, or with `dry_run` would do."""

    kind_of_facts: ClassVar[str] = "run"

    recipe: Path
    dry_run: bool
    results: tuple[Summary, ...]
    """One for each target."""


@dataclass(frozen=True)
class Ready:
    """A recipe whose variables are filled in and whose plugins are found: all that can be wrong with it is not."""

    path: Path
    source: Source
    chain: tuple[TransformLike, ...]
    targets: tuple[Target, ...]
    record: Record


def prepare(path: PathLike, settings: Mapping[str, str] | None = None, *, overwrite: bool = False) -> Ready:
    """Read a recipe, fill in its variables, and find what it names.

    Args:
        path: the YAML file.
        settings: variables that are to have another value, as text.
        overwrite: let every target that exists be replaced.

    Raises:
        UsageError: everything that is wrong with it, a line each.
    """
    place = Path(path)
    yaml = load(place)
    problems = list(yaml.problems)
    if not isinstance(yaml.value, dict):
        raise UsageError("must be a mapping with source, chain and targets", path=place)
    filled = _filled(yaml, dict(settings or {}), place, problems)
    recipe = _validated(yaml, filled, problems)
    chain = _checked_chain(yaml, filled.get("chain"), problems)
    _check_formats(yaml, filled, problems)
    if recipe is None or problems:
        raise UsageError(_listed(place, problems), path=None)
    source = recipe.source if isinstance(recipe.source, Source) else Source(path=recipe.source)
    outputs = [entry if isinstance(entry, Output) else Output(path=entry) for entry in recipe.targets]
    targets = tuple(
        Target(
            path=output.path,
            to=output.to,
            losses=output.losses or recipe.losses,
            overwrite=overwrite or output.overwrite,
            manifest=output.manifest or recipe.manifest,
        )
        for output in outputs
    )
    summary = f"recipe {place.name}: {len(chain)} steps, {len(targets)} target{'s' * (len(targets) != 1)}"
    options = {"recipe": place.name, **{key: filled[key] for key in filled if key != "schema"}}
    record = Record("run", options, "vraxion-ckpt", __version__, Path(source.path).name, summary)
    return Ready(place, source, chain, targets, record)


def run(
    path: PathLike, *, settings: Mapping[str, str] | None = None, dry_run: bool = False, overwrite: bool = False
) -> Ran:
    """Run a recipe: read its source once, run its chain once, write all its targets, or none.

    The recipe, with its variables filled in, stands in the history of every result.

    Args:
        path: the YAML file; paths in it are relative to the current directory, as on the command line.
        settings: as for `prepare`.
        dry_run: do everything but write.
        overwrite: as for `prepare`.

    Raises:
        CkptError: as for `prepare` and `vraxion_ckpt.convert`.
    """
    return carry_out(prepare(path, settings, overwrite=overwrite), dry_run=dry_run)


def carry_out(ready: Ready, *, dry_run: bool = False) -> Ran:
    """Run a recipe that was prepared."""
    source = ready.source
    results = convert_to_all(
        source.path,
        ready.targets,
        transforms=ready.chain,
        from_=source.from_,
        dry_run=dry_run,
        param_names=source.param_names,
        optimizer=source.optimizer,
        allow_globals=source.allow_globals,
        record=ready.record,
    )
    return Ran(recipe=ready.path, dry_run=dry_run, results=results)


# --- variables ---


def _filled(yaml: Yaml, settings: dict[str, str], path: Path, problems: list[Problem]) -> dict[str, Any]:
    """Return a recipe's content with its variables filled in."""
    known: dict[str, Any] = {_FOLDER: str(path.parent)}
    declared = yaml.value.get("vars")
    if not isinstance(declared, dict):
        declared = {}
    for name in settings.keys() - declared.keys():
        problems.append(Problem(("--set", name), f"is no variable of the recipe{_nearest(name, declared)}"))
    used: set[str] = set()
    for name, value in declared.items():
        given = scalar(settings[name]) if name in settings else value
        known[name] = _fill(given, known, ("vars", name), yaml, problems, used)
    rest = {
        key: _fill(value, known, (key,), yaml, problems, used) for key, value in yaml.value.items() if key != "vars"
    }
    for name in declared.keys() - used:
        problems.append(Problem(("vars", name), "is used nowhere", yaml.line(("vars", name))))
    if "vars" not in yaml.value:
        return rest
    return {"vars": {name: known[name] for name in declared} or yaml.value["vars"], **rest}


def _fill(
    value: Any, known: Mapping[str, Any], place: Place, yaml: Yaml, problems: list[Problem], used: set[str]
) -> Any:
    """Fill in the variables of a value; a text that is nothing but one takes its value, whatever its type."""
    if isinstance(value, dict):
        return {key: _fill(entry, known, (*place, key), yaml, problems, used) for key, entry in value.items()}
    if isinstance(value, list):
        return [_fill(entry, known, (*place, i), yaml, problems, used) for i, entry in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replaced(found: re.Match[str]) -> str:
        name = found[2]
        if name is None:
            return "$"
        used.add(name)
        if name not in known:
            problems.append(Problem(place, f"there is no variable {name!r}{_nearest(name, known)}", yaml.line(place)))
            return ""
        return str(known[name])

    whole = _VARIABLE.fullmatch(value)
    if whole and whole[2] in known:
        used.add(whole[2])
        return known[whole[2]]
    return _VARIABLE.sub(replaced, value)


def _nearest(name: str, names: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


# --- what is wrong with it ---


def _validated(yaml: Yaml, filled: dict[str, Any], problems: list[Problem]) -> Recipe | None:
    try:
        recipe = Recipe.model_validate(filled)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            problem = _from_pydantic(yaml, found)
            if problem not in problems:
                problems.append(problem)
        return None
    if recipe.manifest is not None and len(recipe.targets) > 1:
        what = "with several targets, each needs a manifest of its own: write it there"
        problems.append(Problem(("manifest",), what, yaml.line(("manifest",))))
    return recipe


def _from_pydantic(yaml: Yaml, found: Any) -> Problem:
    # Of a union, pydantic names the member that it tried; that is no place in the file.
    place = tuple(part for part in found["loc"] if part not in ("str", "Source", "Output"))
    message = found["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if found["type"] == "extra_forbidden":
        entries: dict[str, type[_Entry]] = {"source": Source, "targets": Output}
        fields = entries.get(str(place[0]), Recipe) if len(place) > 1 else Recipe
        names = {field.alias or name: None for name, field in fields.model_fields.items()}
        message = f"is not known{_nearest(str(place[-1]), names)}"
    elif found["type"] == "missing":
        message = "is required" + ("; to change a checkpoint in place, use `edit`" if place == ("targets",) else "")
    elif found["type"] == "too_short" and place == ("targets",):
        message = "must name at least one; to change a checkpoint in place, use `edit`"
    return Problem(place, message, yaml.line(place))


def _checked_chain(yaml: Yaml, chain: Any, problems: list[Problem]) -> tuple[TransformLike, ...]:
    """Look at every transform, and note what is wrong with each of its options by itself."""
    items: list[TransformLike] = []
    for i, entry in enumerate(chain if isinstance(chain, list) else ()):
        place: Place = ("chain", i)
        if isinstance(entry, str):
            items.append(entry)
            _attempt(lambda: resolve_chain(items[-1:]), place, yaml, problems)
        elif isinstance(entry, dict) and len(entry) == 1:
            (name, options) = next(iter(entry.items()))
            if options is not None and not isinstance(options, dict):
                problems.append(Problem((*place, name), "must be a mapping of options", yaml.line((*place, name))))
                continue
            items.append((name, options or {}))
            wrong = _wrong_options(name, options or {})
            for key, what in wrong:
                inner = (*place, name, key) if key else (*place, name)
                problems.append(Problem(inner, what, yaml.line(inner)))
            if not wrong:
                _attempt(lambda: resolve_chain(items[-1:]), (*place, name), yaml, problems)
        else:
            what = "must be NAME, NAME:key=value, or NAME with a mapping of its options"
            problems.append(Problem(place, what, yaml.line(place)))
    return tuple(items)


def _wrong_options(name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    offers = registry().transforms.get(name, [])
    return problems_with(offers[0].plugin, options) if len(offers) == 1 else []


def _attempt(resolve: Callable[[], object], place: Place, yaml: Yaml, problems: list[Problem]) -> None:
    try:
        resolve()
    except CkptError as error:
        hint = f" ({error.hint})" if error.hint and "describe" not in error.hint else ""
        problems.append(Problem(place, f"{error.message}{hint}", yaml.line(place)))


def _check_formats(yaml: Yaml, filled: Mapping[str, Any], problems: list[Problem]) -> None:
    """Look up every format that is named."""
    source, targets = filled.get("source"), filled.get("targets")
    named: list[tuple[Place, Any]] = [(("source", "from"), source.get("from") if isinstance(source, dict) else None)]
    for i, entry in enumerate(targets if isinstance(targets, list) else ()):
        named.append((("targets", i, "to"), entry.get("to") if isinstance(entry, dict) else None))
    for place, text in named:
        if isinstance(text, str):
            _attempt(partial(resolve_adapter, text), place, yaml, problems)


def _listed(path: Path, problems: Sequence[Problem]) -> str:
    unique = list(dict.fromkeys(problems))
    ordered = sorted(unique, key=lambda problem: problem.line or 0)
    number = "1 thing is" if len(ordered) == 1 else f"{len(ordered)} things are"
    return "\n".join([f"{path}: {number} wrong with it", *(f"  {problem}" for problem in ordered)])


# --- the schema ---


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a recipe, with the options of every transform that is installed."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema.setdefault("$defs", {})
    steps: list[dict[str, Any]] = [{"type": "string", "description": "NAME or NAME:key=value,…"}]
    for name, offers in sorted(registry().transforms.items()):
        if len(offers) == 1:
            definitions[f"transform {name}"] = _options_schema(offers[0].plugin.model_json_schema())
            entry = {"anyOf": [{"$ref": f"#/$defs/transform {name}"}, {"type": "null"}]}
            steps.append(
                {"type": "object", "properties": {name: entry}, "required": [name], "additionalProperties": False}
            )
    schema["properties"]["chain"]["items"] = {"anyOf": steps}
    return {"$schema": _DIALECT, "$id": SCHEMA, **schema}


def _options_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Let every option also be a text: a variable, or its value as on the command line."""
    inner = {name: {"anyOf": [option, {"type": "string"}]} for name, option in schema.get("properties", {}).items()}
    return {**schema, "properties": inner}
