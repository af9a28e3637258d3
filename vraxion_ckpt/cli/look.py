"""The commands that only look: inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vraxion_ckpt.cli import arguments


@click.command(short_help="Show what a checkpoint is and holds.")
@click.argument("path", type=click.Path())
@click.option("--tensors", is_flag=True, help="List every tensor: dtype, shape, bytes.")
@click.option("--values", is_flag=True, help="The same, and read them: minimum, maximum, NaN, infinite.")
@arguments.visits_options
@arguments.read_options
@arguments.as_json
def inspect(path: str, param_names: Path | None, as_json: bool, **options: Any) -> None:
    """Show what PATH is: experts, ring, optimizer and how it is bound, history.

    No tensor's data is read unless --values asks for it.
    """
    arguments.must_exist(path)
    from vraxion_ckpt.cli import show_inspection
    from vraxion_ckpt.inspection import inspect as run

    facts = run(path, param_names=arguments.load_names(param_names), **options)
    arguments.tell(facts, show_inspection.inspection, as_json=as_json)


COMMANDS = (inspect,)
