"""Recipes: a conversion written down in YAML, with variables, and any number of targets.

What stands in one is what stands on the command line: the same names, types and texts. Everything that is wrong with
a recipe is told at once, each with its line, before anything is read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from vraxion_ckpt._version import __version__
from vraxion_ckpt.checkpoint.model import Record
from vraxion_ckpt.conversion.convert import Target, convert_to_all
from vraxion_ckpt.conversion.summary import Summary
from vraxion_ckpt.conversion.verify_before_write import LossPolicy, chain_policy
from vraxion_ckpt.errors import CkptError, OptionError, UsageError
from vraxion_ckpt.experts.companion_updates import CompanionPolicy
from vraxion_ckpt.optimizer.binding import OptimizerOrder
from vraxion_ckpt.plugins.discovery import TransformLike, registry, resolve_adapter, resolve_chain
from vraxion_ckpt.plugins.options import problems_with
from vraxion_ckpt.reading.opening import OptimizerPolicy, PathLike, os_errors_named
from vraxion_ckpt.reading.read_options import ReadOptions
from vraxion_ckpt.recipes.option_keys import keys_for
from vraxion_ckpt.recipes.variables import Filling
from vraxion_ckpt.support.json_models import Facts
from vraxion_ckpt.support.model_errors import Refusal, refusals
from vraxion_ckpt.support.yaml_files import Place, Problem, Yaml, load
from vraxion_ckpt.wording import count, listed

_T = TypeVar("_T")

RECIPE_SCHEMA = "vraxion-ckpt/recipe/1"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_MOST_TOLD = 100  # of what is wrong with a recipe
_MOST_NUMBERS = 10_000_000  # in the lists of all steps: a range of ten letters may stand for as many


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True)


class Source(_Entry):
    """What is read; as a text, only its path."""

    path: str
    from_: str | None = Field(None, alias="from", description="its format, found from its content if not given")
    param_names: tuple[str, ...] | None = None
    """Every optimizer parameter's name in optimizer order."""
    optimizer_order: OptimizerOrder | None = None
    """How its trainer orders the parameters of each param group, if the file does not tell."""
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


def _kind(value: Any) -> str:
    return "entry" if isinstance(value, dict | _Entry) else "text"


_Source = Annotated[Annotated[str, Tag("text")] | Annotated[Source, Tag("entry")], Discriminator(_kind)]
_Output = Annotated[Annotated[str, Tag("text")] | Annotated[Output, Tag("entry")], Discriminator(_kind)]


class Recipe(_Entry):
    """A conversion, written down."""

    schema_: Literal["vraxion-ckpt/recipe/1"] | None = Field(None, alias="schema", description="kind and version")
    vars: dict[str, Any] = {}
    """Variables and what they are if ``--set`` does not say otherwise; ``${name}`` stands for one in any text."""
    source: _Source
    chain: tuple[Any, ...] = ()
    """Transforms, from left to right: ``NAME``, ``NAME:key=value``, or NAME with a mapping of its options."""
    targets: Annotated[tuple[_Output, ...], Field(min_length=1)]
    result_order: tuple[str, ...] | None = None
    """Every name of the results' optimizer in its order, where no rule tells it."""
    companions: CompanionPolicy = "grow"
    """What becomes of averages of the model and the like if the chain changes the head."""
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
    result_order: tuple[str, ...] | None = None
    companions: CompanionPolicy = "grow"


def prepare(path: PathLike, settings: Mapping[str, str] | None = None, *, overwrite: bool = False) -> Ready:
    """Read a recipe, fill in its variables, and find what it names.

    Args:
        path: the YAML file.
        settings: variables that are to have another value, as text like on the command line.
        overwrite: let every target that exists be replaced.

    Raises:
        UsageError: everything that is wrong with it, a line each.
    """
    with os_errors_named(path):
        place = Path(path)
    yaml = load(place)
    if not isinstance(yaml.value, dict):
        raise UsageError("must be a mapping with source, chain and targets", path=place)
    filled = Filling(yaml, dict(settings or {}), str(place.parent)).all()
    faulty = {problem.place for problem in yaml.problems}  # of those, whatever follows is no news
    problems: list[Problem] = []
    recipe = _validated(yaml, filled, problems)
    chain = _checked_chain(yaml, filled.get("chain"), problems)
    _check_formats(yaml, filled, problems)
    problems = [*yaml.problems, *(p for p in problems if not any(p.place[:n] in faulty for n in range(1, 9)))]
    if recipe is None or problems:
        raise UsageError(_listed(place, problems))
    source = recipe.source if isinstance(recipe.source, Source) else Source(path=recipe.source)
    outputs = [entry if isinstance(entry, Output) else Output(path=entry) for entry in recipe.targets]
    targets = tuple(
        Target(
            path=output.path,
            to=output.to,
            losses=output.losses or recipe.losses,
            overwrite=overwrite or output.overwrite,
            manifest=output.manifest if output.manifest is not None else recipe.manifest,
        )
        for output in outputs
    )
    summary = f"recipe {place.name}: {count(len(chain), 'step')}, {count(len(targets), 'target')}"
    options = {"recipe": place.name, **{key: filled[key] for key in filled if key != "schema"}}
    record = Record("run", options, "vraxion-ckpt", __version__, Path(source.path).name, summary)
    return Ready(place, source, chain, targets, record, recipe.result_order, recipe.companions)


def run(
    path: PathLike, *, settings: Mapping[str, str] | None = None, dry_run: bool = False, overwrite: bool = False
) -> Ran:
    """Run a recipe: read its source once, run its chain once, write all targets before the first is put in place.

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
    try:
        results = convert_to_all(
            source.path,
            ready.targets,
            transforms=ready.chain,
            options=ReadOptions(source.from_, source.param_names, source.optimizer_order, source.allow_globals),
            optimizer=source.optimizer,
            policy=chain_policy(ready.companions, ready.result_order),
            dry_run=dry_run,
            record=ready.record,
            reads=[ready.path],
        )
    except CkptError as error:
        for option, key in keys_for(f"{error.message} {error.hint or ''}"):
            error.add_note(f"in a recipe, {option} is the key {key}")
        raise
    return Ran(recipe=ready.path, dry_run=dry_run, results=results)


# --- what is wrong with it ---


def _validated(yaml: Yaml, filled: dict[str, Any], problems: list[Problem]) -> Recipe | None:
    targets = filled.get("targets")
    if filled.get("manifest") is not None and isinstance(targets, list) and len(targets) > 1:
        what = "with several targets, each needs a manifest of its own: write it there"
        problems.append(Problem(("manifest",), what, yaml.line(("manifest",))))
    try:
        return Recipe.model_validate(filled)
    except ValidationError as error:
        found = (_from_refusal(yaml, refusal) for refusal in refusals(error, Recipe))
        problems += [problem for problem in found if problem is not None]
        return None


def _from_refusal(yaml: Yaml, refusal: Refusal) -> Problem | None:
    # Where a text or a mapping may stand, pydantic names which it took it for; that is no place in the file.
    place = tuple(part for part in refusal.place if part not in ("text", "entry"))
    what = refusal.what
    if refusal.kind == "extra_forbidden" and (homes := _homes(str(place[-1]))):
        what = f"is not known here; it is a key of {' and of '.join(homes)}"
    elif refusal.kind == "string_type" and place in (("source",), ("targets", place[-1])):
        what = "must be a text, or a mapping with `path`"
    elif refusal.kind == "missing" and place == ("targets",):
        what = "is required; to change a checkpoint in place, use `edit`"
    elif refusal.kind == "too_short":
        if yaml.value.get("targets"):
            return None  # there are some, and what is wrong with them is told
        what = "must name at least one; to change a checkpoint in place, use `edit`"
    return Problem(place, what, yaml.line(place))


def _homes(key: str) -> list[str]:
    """Return the mappings of a recipe that have a key."""
    entries: dict[str, type[_Entry]] = {"source": Source, "targets": Output, "the top level": Recipe}
    fields = {name: entry.model_fields.items() for name, entry in entries.items()}
    return [name for name, found in fields.items() if key in {field.alias or each for each, field in found}]


def _checked_chain(yaml: Yaml, chain: Any, problems: list[Problem]) -> tuple[TransformLike, ...]:
    """Look at every transform, and note what is wrong with each of its options by itself."""
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
    """Resolve a step, and count the entries of its lists: they take memory that its text does not."""
    (step,) = resolve_chain([item])
    return sum(len(value) for _, value in step.transform if isinstance(value, tuple))


def _as_text(value: Any) -> Any:
    """Return true and false as the command line has them: no number is meant where a number is wanted."""
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
    told = listed(ordered, _MOST_TOLD, "\n  ")
    return f"{path}: {count(len(ordered), 'problem')}\n  {told}"


# --- the schema ---


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a recipe, with the options of every transform that is installed."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema.setdefault("$defs", {})
    for entry in (schema, definitions["Source"], definitions["Output"]):
        for name, value in entry["properties"].items():
            if "enum" in value or value.get("type") == "boolean" or "const" in str(value):
                entry["properties"][name] = {"anyOf": [value, _VARIABLE_SCHEMA]}
    scalars = {"type": ["string", "number", "boolean", "null"]}
    schema["properties"]["vars"]["additionalProperties"] = scalars
    steps: list[dict[str, Any]] = [{"type": "string", "description": "NAME or NAME:key=value,…"}]
    for name, offers in sorted(registry().transforms.items()):
        if len(offers) == 1:
            definitions[f"transform {name}"] = _options_schema(offers[0].plugin.model_json_schema())
            options = {"anyOf": [{"$ref": f"#/$defs/transform {name}"}, {"type": "null"}]}
            steps.append(
                {"type": "object", "properties": {name: options}, "required": [name], "additionalProperties": False}
            )
    schema["properties"]["chain"]["items"] = {"anyOf": steps}
    return {"$schema": _DIALECT, "$id": RECIPE_SCHEMA, **schema}


_VARIABLE_SCHEMA = {"type": "string", "pattern": r"\$\{", "description": "a variable"}


def _options_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Let every option also be a text: a variable, or its value as on the command line."""
    inner = {name: {"anyOf": [option, {"type": "string"}]} for name, option in schema.get("properties", {}).items()}
    return {**schema, "properties": inner}
