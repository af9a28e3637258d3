"""The commands about the program itself: plugins, describe, demo."""

from __future__ import annotations

from pathlib import Path

import click

from vraxion_ckpt.cli import arguments
from vraxion_ckpt.errors import UsageError


@click.command(short_help="List formats, transforms and probes.")
@arguments.as_json
def plugins(as_json: bool) -> None:
    """List formats and transforms, and the package each comes from."""
    from vraxion_ckpt.catalogue import list_plugins
    from vraxion_ckpt.cli import show_plugins

    arguments.tell(list_plugins(), show_plugins.plugins, as_json=as_json)


@click.command(short_help="Show a plugin's options.")
@click.argument("name")
@arguments.as_json
def describe(name: str, as_json: bool) -> None:
    """Show the options of one format or transform: type, default, meaning."""
    from vraxion_ckpt import catalogue
    from vraxion_ckpt.cli import show_plugins

    arguments.tell(catalogue.describe(name), show_plugins.description, as_json=as_json)


@click.command(short_help="Run the whole loop on a real checkpoint.")
@click.argument("directory", type=click.Path(path_type=Path), required=False)
def demo(directory: Path | None) -> None:
    """Run the whole loop on a bundled real checkpoint, and prove what it says.

    Results go to DIRECTORY, or to a new temporary one. Those of an earlier demo are replaced.
    """
    if directory is not None and directory.exists() and not directory.is_dir():
        raise UsageError("is no directory", path=directory)
    from vraxion_ckpt.cli.demo import run

    run(directory)


COMMANDS = (plugins, describe, demo)
