"""The commands that write checkpoints: convert, edit, run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vraxion_ckpt.cli import arguments, output
from vraxion_ckpt.cli.command import command
from vraxion_ckpt.cli.completion import complete_format
from vraxion_ckpt.errors import StorageError, UsageError
from vraxion_ckpt.support import signals

if TYPE_CHECKING:
    from vraxion_ckpt.conversion.edit import Edited
    from vraxion_ckpt.conversion.summary import Summary
    from vraxion_ckpt.recipes.recipe import Ran

_S = TypeVar("_S", "Summary", "Edited", "Ran")


@command(short_help="Convert between formats, through a chain of transforms.")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@arguments.chain_options
@click.option(
    "--to",
    metavar="F[:k=v]",
    shell_complete=complete_format,
    help="Format of the target; without it, the end of DST decides: .pt, .safetensors, or / for a directory.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing target, in one step, at the end.")
@arguments.manifest
@click.option("--dry-run", is_flag=True, help="Do everything except writing.")
@arguments.read_options
@arguments.as_json
@click.pass_context
def convert(
    context: click.Context,
    /,
    src: str,
    dst: str,
    param_names: Path | None,
    result_order: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Read SRC, run a chain of transforms, write DST.

    \b
    vraxion-ckpt convert run.pt run_modular/
    vraxion-ckpt convert run.pt split.pt -t single_to_experts \\
        -t arc_meta:visits=visits.json -t mitosis_split:noise=0
    """  # noqa: D301 - click reads the escape
    arguments.must_exist(src)
    from vraxion_ckpt.cli import show_changes
    from vraxion_ckpt.conversion.convert import convert as run

    names, order = arguments.load_names(param_names), arguments.load_names(result_order, "--result-order")
    with output.unless_too_late(dst):
        done = run(src, dst, param_names=names, result_order=order, **options)
        _print_summary(context, done, show_changes.print_conversion, as_json=as_json)


@command(short_help="Change a checkpoint in place, through a chain of transforms.")
@click.argument("path", type=click.Path())
@arguments.chain_options
@click.option(
    "--to",
    metavar="F[:k=v]",
    shell_complete=complete_format,
    help="The format of PATH, with options for writing.",
)
@click.option("--keep-old", is_flag=True, help="Keep the previous state as PATH.old.")
@arguments.manifest
@click.option("--dry-run", is_flag=True, help="Print which files would be written and removed, and write nothing.")
@arguments.read_options
@arguments.as_json
@click.pass_context
def edit(
    context: click.Context,
    /,
    path: str,
    param_names: Path | None,
    result_order: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a chain of transforms on PATH in place. At every moment, PATH is in the old state or in the new one.

    In a modular directory, only the files that change are written. Without -t, the command only cleans up after a run
    that was killed.

    \b
    vraxion-ckpt edit run_modular/ -t arc_meta:visits=visits.json \\
        -t mitosis_split:noise=0
    """  # noqa: D301 - click reads the escape
    arguments.must_exist(path)
    from vraxion_ckpt.cli import show_changes
    from vraxion_ckpt.conversion.edit import edit as run

    names, order = arguments.load_names(param_names), arguments.load_names(result_order, "--result-order")
    with output.unless_too_late(path):
        done = run(path, param_names=names, result_order=order, **options)
        _print_summary(context, done, show_changes.print_edit, as_json=as_json)


def _print_recipe_schema(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from vraxion_ckpt.recipes.recipe_model import json_schema

        click.echo(json.dumps(json_schema(), indent=2))
        context.exit()


@command(short_help="Run a conversion that is described in a YAML file.")
@click.argument("recipe", type=click.Path())
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Set a variable of the recipe; repeatable."
)
@click.option("--overwrite", is_flag=True, help="Replace existing targets, each in one step, at the end.")
@click.option("--dry-run", is_flag=True, help="Do everything except writing.")
@click.option(
    "--print-schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_recipe_schema,
    help="Print the JSON Schema of recipes, and exit.",
)
@arguments.as_json
@click.pass_context
def run(
    context: click.Context, /, recipe: str, settings: tuple[str, ...], overwrite: bool, dry_run: bool, as_json: bool
) -> None:
    """Run RECIPE, a YAML file: read its source, run its chain, write its targets.

    All targets are written and read back before the first one is put in place. Paths in a recipe are relative to the
    current directory, as on the command line; ${recipe_dir} is the folder of the recipe.

    A recipe, and a call that sets its variable:

    \b
    vars: {run: runs/r1}
    source: ${run}/ckpt_pre_split.pt
    chain:
      - arc_meta: {visits: "${run}/visits.json"}
      - mitosis_split: {noise: 0}
    targets: ["${run}/ckpt_post_split.pt"]

    \b
    vraxion-ckpt run refine.yaml --set run=runs/r2
    """  # noqa: D301 - click reads the escape
    arguments.must_exist(recipe)
    given = _given(settings)
    from vraxion_ckpt.cli import show_changes
    from vraxion_ckpt.recipes.recipe import carry_out, prepare

    ready = prepare(recipe, given, overwrite=overwrite)
    with output.unless_too_late(*(os.fspath(target.path) for target in ready.targets)):
        done = carry_out(ready, dry_run=dry_run)
        _print_summary(context, done, show_changes.print_run, as_json=as_json)


def _given(settings: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {text!r} is not NAME=VALUE")
        if name in given:
            raise UsageError(f"--set {name} is given twice")
        given[name] = value
    return given


def _print_summary(context: click.Context, done: _S, show: Callable[..., None], *, as_json: bool) -> None:
    """Print a summary. If that fails, the error says that the target was written."""
    options = context.find_root().params
    try:
        if as_json or not options["quiet"]:
            arguments.print_result(done, partial(show, verbose=options["verbose"]), as_json=as_json)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        output.drop_output()
        targets = ", ".join(str(each.target) for each in _summaries(done))
        what = "the dry run succeeded" if done.dry_run else f"{targets} was written"
        message = f"{what}, but the summary could not be printed: {error.strerror}"
        raise StorageError(message, path="the output") from error
    finally:
        signals.ignore_signals()  # the target is complete, so a signal must not change the exit code


def _summaries(done: Summary | Ran) -> Sequence[Summary]:
    from vraxion_ckpt.conversion.summary import Summary

    return (done,) if isinstance(done, Summary) else done.results


CHANGE_COMMANDS = (convert, edit, run)
