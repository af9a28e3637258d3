"""Arguments that several commands take, and how a command prints what it found."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vraxion_ckpt.cli import output
from vraxion_ckpt.cli.completion import complete_format, complete_transform
from vraxion_ckpt.errors import CkptError, OutOfMemoryError, UsageError
from vraxion_ckpt.printable import printable_facts
from vraxion_ckpt.support import text_files

if TYPE_CHECKING:
    from vraxion_ckpt.support.json_models import Facts

_F = TypeVar("_F", bound=Callable[..., Any])
_S = TypeVar("_S", bound="Facts")


def as_json(option: _F) -> _F:
    """Take ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")(option)


def _taking(command: _F, *options: Callable[[_F], _F]) -> _F:
    for option in options:
        command = option(command)
    return command


def read_options(command: _F) -> _F:
    """Take what says how a source is to be read."""
    return _taking(
        command,
        click.option(
            "--from",
            "from_",
            metavar="F[:k=v]",
            shell_complete=complete_format,
            help="Format of the source; found from its content.",
        ),
        click.option(
            "--param-names",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Names of the optimizer's parameters in its order: one a line, or a JSON list.",
        ),
        click.option(
            "--optimizer-order",
            type=click.Choice(["model", "sorted", "reversed"]),
            help="How its trainer orders the parameters of each group, or groups of one, where the file does not tell.",
        ),
        click.option(
            "--allow-global",
            "allow_globals",
            multiple=True,
            allow_from_autoenv=False,  # what may be loaded is said in the call, never by the surroundings
            metavar="NAME",
            help="A class the source's pickle may use, by full name; repeatable.",
        ),
    )


def chain_options(command: _F) -> _F:
    """Take a chain of transforms, and what may be lost on the way."""
    return _taking(
        command,
        click.option(
            "--losses",
            type=click.Choice(["raise", "warn", "ignore"]),
            default="raise",
            show_default=True,
            help="What to do about what the target format cannot hold.",
        ),
        click.option(
            "--optimizer",
            type=click.Choice(["keep", "drop", "complete", "partial"]),
            default="keep",
            show_default=True,
            help="Carry the optimizer's state along, or leave it behind; add the experts that it lacks, without state, "
            "or carry it without them.",
        ),
        click.option(
            "--result-order",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Names of the result's optimizer in its order, where no rule tells it: as --param-names.",
        ),
        click.option(
            "--companions",
            type=click.Choice(["grow", "keep", "drop"]),
            default="grow",
            show_default=True,
            help="What becomes of averages of the model and the like, if the head changes.",
        ),
        click.option(
            "-t",
            "--transform",
            "transforms",
            multiple=True,
            metavar="NAME[:k=v,…]",
            shell_complete=complete_transform,
            help="A step of the chain; repeatable.",
        ),
    )


def manifest(command: _F) -> _F:
    """Take ``--manifest``."""
    return click.option(
        "--manifest", type=click.Path(), metavar="FILE", help="Write the digests of all files to FILE, for `check`."
    )(command)


def visits_options(command: _F) -> _F:
    """Take files of visits, before a split and after training was resumed, and the checkpoint before the split."""
    return _taking(
        command,
        click.option("--against", type=click.Path(), metavar="OLD", help="The checkpoint before the split."),
        click.option("--visits-after", type=click.Path(), metavar="FILE", help="Visits counted after the resume."),
        click.option(
            "--visits",
            type=click.Path(),
            metavar="FILE",
            help="Visits counted before the split, one number an address.",
        ),
    )


def must_exist(path: str) -> None:
    """Refuse a missing source before torch is imported."""
    if not Path(path).exists():
        raise UsageError("no such file or directory", path=path)


_MOST_NAMES = 2**26  # bytes of them


def load_names(path: Path | None, option: str = "--param-names") -> list[str] | None:
    """Read the names in the file of an option: one a line, or a JSON list.

    Raises:
        UsageError: there is no such file, or it is not a regular one of text.
    """
    if path is None:
        return None
    try:
        text = text_files.read_text(path, most=_MOST_NAMES, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{option}: is not UTF-8 text", path=path) from error
    except OutOfMemoryError:
        raise
    except CkptError as error:
        raise UsageError(f"{option}: {error.message}", path=path) from error
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    from vraxion_ckpt.support import json_files

    names = json_files.parse_json(text, path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{option}: must be a list of names", path=path)
    return list(names)


def tell(facts: _S, show: Callable[[_S], None], *, as_json: bool) -> None:
    """Print facts to standard output: as JSON, or for people by `show`."""
    try:
        if as_json:
            click.echo(json.dumps(facts.as_json(), indent=2, allow_nan=False))
        else:
            show(printable_facts(facts))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        output.drop_output()  # whoever read it has enough; the exit code is still the answer
