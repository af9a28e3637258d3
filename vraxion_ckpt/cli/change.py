"""The commands that write checkpoints: convert, edit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vraxion_ckpt import signals
from vraxion_ckpt.cli import arguments, output
from vraxion_ckpt.errors import StorageError

if TYPE_CHECKING:
    from vraxion_ckpt.summary import Summary

_S = TypeVar("_S", bound="Summary")


@click.command(short_help="Convert between formats, through a chain of transforms.")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@arguments.chain_options
@click.option(
    "--to", metavar="F[:k=v]", help="Format of the target; follows from its name: .pt, .safetensors, or / at the end."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing target, in one step, at the end.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@arguments.read_options
@arguments.as_json
@click.pass_context
def convert(
    context: click.Context, /, src: str, dst: str, param_names: Path | None, as_json: bool, **options: Any
) -> None:
    """Read SRC, run a chain of transforms, write DST.

    \b
    vraxion-ckpt convert run.pt run_modular/
    vraxion-ckpt convert run.pt split.pt -t single_to_experts
        -t arc_meta:visits=visits.json -t mitosis_split:noise=0
    """  # noqa: D301 - click reads the escape
    arguments.must_exist(src)
    from vraxion_ckpt.cli import show_changes
    from vraxion_ckpt.pipeline import convert as run

    names = arguments.load_names(param_names)
    with _unless_too_late(dst):
        done = run(src, dst, param_names=names, **options)
        _tell(context, done, show_changes.converted, as_json=as_json)


@click.command(short_help="Change a checkpoint in place, through a chain of transforms.")
@click.argument("path", type=click.Path())
@arguments.chain_options
@click.option("--to", metavar="F[:k=v]", help="The same format, with options for writing.")
@click.option("--keep-old", is_flag=True, help="Leave the previous state beside it, as PATH.old.")
@click.option("--dry-run", is_flag=True, help="Say which files would be written and removed, and write nothing.")
@arguments.read_options
@arguments.as_json
@click.pass_context
def edit(context: click.Context, /, path: str, param_names: Path | None, as_json: bool, **options: Any) -> None:
    """Run a chain of transforms on PATH where it lies: it is in the old state or in the new one, at every moment.

    Of a modular directory, only the files that change are written. Without -t, it only cleans up what a killed run
    has left.

    \b
    vraxion-ckpt edit run_modular/ -t arc_meta:visits=visits.json
        -t mitosis_split:noise=0
    """  # noqa: D301 - click reads the escape
    arguments.must_exist(path)
    from vraxion_ckpt.cli import show_changes
    from vraxion_ckpt.inplace import edit as run

    names = arguments.load_names(param_names)
    with _unless_too_late(path):
        done = run(path, param_names=names, **options)
        _tell(context, done, show_changes.edited, as_json=as_json)


@contextmanager
def _unless_too_late(target: str) -> Iterator[None]:
    """End with 0, and say so, where a signal comes when the target is already in its new state."""
    try:
        yield
    except signals.Interrupted:
        from vraxion_ckpt.transaction import committed

        if Path(os.path.realpath(target)) not in committed:
            raise
        output.say("warning", f"the signal came too late: {target} was written", "yellow")
        raise click.exceptions.Exit(0) from None


def _tell(context: click.Context, done: _S, show: Callable[..., None], *, as_json: bool) -> None:
    """Print a summary; if that fails, say that the work is done all the same."""
    options = context.find_root().params
    try:
        if as_json or not options["quiet"]:
            arguments.tell(done, partial(show, verbose=options["verbose"]), as_json=as_json)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        output.drop_output()
        what = "nothing was to be written" if done.dry_run else f"{done.target} was written"
        raise StorageError(f"{what}, but not this summary: {error.strerror}", path="the output") from error


COMMANDS = (convert, edit)
