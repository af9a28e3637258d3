"""Arguments that several commands share, and printing of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vraxion_ckpt.cli import output
from vraxion_ckpt.cli.command import add_options
from vraxion_ckpt.cli.completion import complete_format, complete_transform
from vraxion_ckpt.errors import CkptError, OutOfMemoryError, UsageError
from vraxion_ckpt.printable import printable_facts
from vraxion_ckpt.support import text_files

if TYPE_CHECKING:
    from vraxion_ckpt.support.json_models import Facts

_F = TypeVar("_F", bound=Callable[..., Any])
_S = TypeVar("_S", bound="Facts")


def as_json(option: _F) -> _F:
    """Add ``--json``, which may also be given before the command."""
    return click.option(
        "--json", "as_json", is_flag=True, callback=_here_or_before, help="Print the result as JSON instead of text."
    )(option)


def _here_or_before(context: click.Context, _: click.Parameter, given: bool) -> bool:
    return given or bool(context.find_root().params.get("as_json"))


def read_options(command: _F) -> _F:
    """Add the options for reading a source."""
    return add_options(
        command,
        click.option(
            "--from",
            "from_",
            metavar="F[:k=v]",
            shell_complete=complete_format,
            help="Format of the source; without it, the format is detected from the content.",
        ),
        click.option(
            "--param-names",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="File with the names of the optimizer's parameters in optimizer order: one per line, or a JSON list.",
        ),
        click.option(
            "--optimizer-order",
            type=click.Choice(["model", "sorted", "reversed"]),
            help="Order of the parameters in each group of the optimizer, if the file does not record it.",
        ),
        click.option(
            "--allow-global",
            "allow_globals",
            multiple=True,
            allow_from_autoenv=False,  # an environment variable must not allow classes
            metavar="NAME",
            help="Full name of a class that the source's pickle may use; repeatable.",
        ),
        click.option(
            "--drop-key",
            "drop_keys",
            multiple=True,
            allow_from_autoenv=False,  # nor leave out entries
            metavar="KEY",
            help="Entry of the payload to leave out, such as args or scheduler.lr_lambdas; repeatable.",
        ),
    )


def chain_options(command: _F) -> _F:
    """Add the options for a chain of transforms, and for data that the target format cannot hold."""
    return add_options(
        command,
        click.option(
            "--losses",
            type=click.Choice(["raise", "warn", "ignore"]),
            default="raise",
            show_default=True,
            help="What to do if the target format cannot hold everything.",
        ),
        click.option(
            "--optimizer",
            type=click.Choice(["keep", "drop", "complete", "partial"]),
            default="keep",
            show_default=True,
            help="keep: keep the optimizer; drop: leave it out; complete: add missing experts to it, without state; "
            "partial: keep it although experts are missing.",
        ),
        click.option(
            "--result-order",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Like --param-names, but for the optimizer of the result, if no rule determines its order.",
        ),
        click.option(
            "--companions",
            type=click.Choice(["grow", "keep", "drop"]),
            default="grow",
            show_default=True,
            help="When the head changes: grow: change averages and other copies of the model in the same way; "
            "keep: leave them unchanged; drop: leave them out.",
        ),
        click.option(
            "--neighbours",
            type=click.Choice(["refuse", "ignore"]),
            default="refuse",
            show_default=True,
            help="When the model changes and files beside the weights do not fit it any more, such as optimizer.pt: "
            "refuse, or ignore them: leave them out.",
        ),
        click.option(
            "-t",
            "--transform",
            "transforms",
            multiple=True,
            metavar="NAME[:k=v,…]",
            shell_complete=complete_transform,
            help="Transform to run; repeatable. They run from left to right.",
        ),
    )


def manifest(command: _F) -> _F:
    """Add ``--manifest``."""
    return click.option(
        "--manifest", type=click.Path(), metavar="FILE", help="Write the digests of all files to FILE, for `check`."
    )(command)


def visits_options(command: _F) -> _F:
    """Add the options for visits before and after a split, and for the checkpoint before the split."""
    return add_options(
        command,
        click.option("--against", type=click.Path(), metavar="OLD", help="The checkpoint before the split."),
        click.option(
            "--visits-after",
            type=click.Path(),
            metavar="FILE",
            help="Visits per address, counted after training resumed.",
        ),
        click.option(
            "--visits",
            type=click.Path(),
            metavar="FILE",
            help="Visits per address, counted before the split: a list of numbers.",
        ),
    )


def must_exist(path: str) -> None:
    """Raise UsageError if a source is missing. Commands call this before they import torch."""
    if not Path(path).exists():
        raise UsageError("no such file or directory", path=path)


_MOST_NAMES = 2**26  # largest size in bytes of a file of names


def load_names(path: Path | None, option: str = "--param-names") -> list[str] | None:
    """Read a file of names, which has one name per line or a JSON list.

    Returns:
        The names, or None if `path` is None.

    Raises:
        UsageError: the file does not exist, or does not contain names in UTF-8.
    """
    if path is None:
        return None
    try:
        text = text_files.read_text(path, most=_MOST_NAMES, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{option}: the file is not UTF-8 text", path=path) from error
    except OutOfMemoryError:
        raise
    except CkptError as error:
        raise UsageError(f"{option}: {error.message}", path=path) from error
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    from vraxion_ckpt.support import json_files

    names = json_files.parse_json(text, path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{option}: the JSON must be a list of names", path=path)
    return list(names)


def print_facts(facts: _S, show: Callable[[_S], None], *, as_json: bool) -> None:
    """Print facts to standard output, as JSON or by calling `show`.

    Raises:
        BrokenPipeError: the reader of standard output has closed it.
    """
    if as_json:
        click.echo(json.dumps(facts.as_json(), indent=2, allow_nan=False))
    else:
        show(printable_facts(facts))
    if sys.stdout is not None:
        sys.stdout.flush()


def print_result(facts: _S, show: Callable[[_S], None], *, as_json: bool) -> None:
    """Print facts as `print_facts` does, but ignore a closed pipe, so that the exit code shows the result."""
    try:
        print_facts(facts, show, as_json=as_json)
    except BrokenPipeError:
        output.drop_output()
