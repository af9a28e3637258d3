"""The commands about the program itself: plugins, describe, schema, demo."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vraxion_ckpt.cli import arguments
from vraxion_ckpt.cli.completion import complete_plugin
from vraxion_ckpt.errors import UsageError


@click.command(short_help="List formats, transforms and probes.")
@arguments.as_json
def plugins(as_json: bool) -> None:
    """List formats and transforms, and the package each comes from."""
    from vraxion_ckpt.cli import show_plugins
    from vraxion_ckpt.plugins.catalogue import list_plugins

    arguments.tell(list_plugins(), show_plugins.print_plugins, as_json=as_json)


@click.command(short_help="Show a plugin's options.")
@click.argument("name", shell_complete=complete_plugin)
@arguments.as_json
def describe(name: str, as_json: bool) -> None:
    """Show the options of one format or transform: type, default, meaning."""
    from vraxion_ckpt.cli import show_plugins
    from vraxion_ckpt.plugins import catalogue

    arguments.tell(catalogue.describe_plugin(name), show_plugins.print_description, as_json=as_json)


@click.command(short_help="Run the whole loop on a real checkpoint.")
@click.argument("directory", type=click.Path(path_type=Path), required=False)
def demo(directory: Path | None) -> None:
    """Run the whole loop on a bundled real checkpoint, and prove what it says.

    Results go to DIRECTORY, or to a new temporary one. Those of an earlier demo are replaced, and nothing else is.
    """
    if directory is not None and directory.exists() and not directory.is_dir():
        raise UsageError("is no directory", path=directory)
    from vraxion_ckpt.cli.demo import run_demo

    run_demo(directory)


@click.command(short_help="Print the JSON Schema of what --json prints.")
@click.argument("name", required=False)
def schema(name: str | None) -> None:
    """Print the JSON Schema of the --json output of the command NAME, or of a manifest; without NAME, list them.

    The schema of a recipe is printed by `run --print-schema`.
    """
    from vraxion_ckpt.cli import schemas

    if name is None:
        for known, facts in schemas.SCHEMAS.items():
            click.echo(f"{known:10}{facts.schema_name()}")
        return
    click.echo(json.dumps(schemas.schema_of(name), indent=2))


ABOUT_COMMANDS = (plugins, describe, schema, demo)
