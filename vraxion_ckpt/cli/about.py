"""The commands about the program itself: plugins, describe, schema, demo."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vraxion_ckpt.cli import arguments
from vraxion_ckpt.cli.command import command
from vraxion_ckpt.cli.completion import complete_plugin
from vraxion_ckpt.errors import UsageError


@command(short_help="List formats, transforms and probes.")
@arguments.as_json
def plugins(as_json: bool) -> None:
    """List all formats, transforms and probes, and the package of each."""
    from vraxion_ckpt.cli import show_plugins
    from vraxion_ckpt.plugins.catalogue import list_plugins

    arguments.print_facts(list_plugins(), show_plugins.print_plugins, as_json=as_json)


@command(short_help="Show a plugin's options.")
@click.argument("name", shell_complete=complete_plugin)
@arguments.as_json
def describe(name: str, as_json: bool) -> None:
    """Show the options of one format or transform: type, default, meaning."""
    from vraxion_ckpt.cli import show_plugins
    from vraxion_ckpt.plugins import catalogue

    arguments.print_facts(catalogue.describe_plugin(name), show_plugins.print_description, as_json=as_json)


@command(short_help="Inspect, convert and split a bundled checkpoint.")
@click.argument("directory", type=click.Path(path_type=Path), required=False)
def demo(directory: Path | None) -> None:
    """Inspect, convert and split a bundled real checkpoint, and verify the results.

    Results are written to DIRECTORY, or to a new temporary one. Only results of an earlier demo are replaced.
    """
    if directory is not None and directory.exists() and not directory.is_dir():
        raise UsageError("is not a directory", path=directory)
    from vraxion_ckpt.cli.demo import run_demo

    run_demo(directory)


@command(short_help="Print the JSON Schema of a command's --json output.")
@click.argument("name", required=False)
def schema(name: str | None) -> None:
    """Print the JSON Schema of the --json output of the command NAME, or of a manifest. Without NAME, list all schemas.

    `run --print-schema` prints the schema of recipes.
    """
    from vraxion_ckpt.cli import schemas

    if name is None:
        for known, facts in schemas.SCHEMAS.items():
            click.echo(f"{known:10}{facts.schema_name()}")
        return
    click.echo(json.dumps(schemas.schema_of(name), indent=2))


ABOUT_COMMANDS = (plugins, describe, schema, demo)
