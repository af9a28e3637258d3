"""Recipes: conversions in YAML files, with variables and any number of targets.

Keys, types and texts are those of the command line. All problems of a recipe are reported together, each with its
line, before anything is read or written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vraxion_ckpt._version import __version__
from vraxion_ckpt.checkpoint.provenance import Record
from vraxion_ckpt.conversion.chain import ChainPolicy
from vraxion_ckpt.conversion.convert import Target, convert_to_all
from vraxion_ckpt.conversion.summary import Summary
from vraxion_ckpt.conversion.verify_before_write import chain_policy
from vraxion_ckpt.errors import CkptError, UsageError
from vraxion_ckpt.plugins.discovery import TransformLike
from vraxion_ckpt.reading.opening import PathLike, os_errors_named
from vraxion_ckpt.reading.read_options import ReadOptions
from vraxion_ckpt.recipes.option_keys import keys_for
from vraxion_ckpt.recipes.recipe_model import Output, Source
from vraxion_ckpt.recipes.recipe_problems import check_recipe
from vraxion_ckpt.recipes.variables import Filling
from vraxion_ckpt.support.json_models import Facts
from vraxion_ckpt.support.yaml_files import load
from vraxion_ckpt.wording import count


class Ran(Facts):
    """The results of a recipe, or the expected results if `dry_run`."""

    kind_of_facts: ClassVar[str] = "run"

    recipe: Path
    dry_run: bool
    results: tuple[Summary, ...]
    """One summary for each target."""


@dataclass(frozen=True)
class Ready:
    """A validated recipe: its variables are replaced and its plugins are resolved."""

    path: Path
    source: Source
    chain: tuple[TransformLike, ...]
    targets: tuple[Target, ...]
    record: Record
    policy: ChainPolicy


def prepare(path: PathLike, settings: Mapping[str, str] | None = None, *, overwrite: bool = False) -> Ready:
    """Read a recipe, replace its variables and resolve its plugins.

    Args:
        path: the YAML file.
        settings: values of variables, as text as on the command line.
        overwrite: replace existing targets.

    Returns:
        The validated recipe.

    Raises:
        UsageError: the message lists every problem of the recipe, one on each line.
    """
    with os_errors_named(path):
        place = Path(path)
    yaml = load(place)
    if not isinstance(yaml.value, dict):
        raise UsageError("must be a mapping with source, chain and targets", path=place)
    filled = Filling(yaml, dict(settings or {}), str(place.parent)).all()
    recipe, chain = check_recipe(place, yaml, filled)
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
    policy = chain_policy(recipe.companions, recipe.neighbours, recipe.result_order)
    return Ready(place, source, chain, targets, record, policy)


def run(
    path: PathLike, *, settings: Mapping[str, str] | None = None, dry_run: bool = False, overwrite: bool = False
) -> Ran:
    """Run a recipe: read the source once, run the chain once, and stage all targets before the first is committed.

    The history of every result records the recipe with its variables replaced.

    Args:
        path: the YAML file. Paths in it are relative to the current directory, as on the command line.
        settings: as for `prepare`.
        dry_run: do everything except writing.
        overwrite: as for `prepare`.

    Returns:
        The summary of each target.

    Raises:
        UsageError: the message lists every problem of the recipe, one on each line.
        CkptError: any error of `vraxion_ckpt.convert`.
    """
    return carry_out(prepare(path, settings, overwrite=overwrite), dry_run=dry_run)


def carry_out(ready: Ready, *, dry_run: bool = False) -> Ran:
    """Run a recipe that `prepare` returned. Raises the errors of `vraxion_ckpt.convert`."""
    source = ready.source
    try:
        results = convert_to_all(
            source.path,
            ready.targets,
            transforms=ready.chain,
            options=ReadOptions(
                source.from_, source.param_names, source.optimizer_order, source.allow_globals, source.drop_keys
            ),
            optimizer=source.optimizer,
            policy=ready.policy,
            dry_run=dry_run,
            record=ready.record,
            reads=[ready.path],
        )
    except CkptError as error:
        for option, key in keys_for(f"{error.message} {error.hint or ''}"):
            error.add_note(f"in a recipe, {option} is the key {key}")
        raise
    return Ran(recipe=ready.path, dry_run=dry_run, results=results)
