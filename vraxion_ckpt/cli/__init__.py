"""The commands: parse, call, print. Torch is imported only by a command that needs it.

Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from vraxion_ckpt import signals
from vraxion_ckpt._version import __version__
from vraxion_ckpt.errors import CkptError, CkptWarning, StorageError, UsageError

if TYPE_CHECKING:
    from vraxion_ckpt.summary import Summary

_INTERNAL_ERROR = 70
_F = TypeVar("_F", bound=Callable[..., Any])
_S = TypeVar("_S", bound="Summary")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with the code of what happened."""
    signals.raise_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an arrow must not fail on a terminal that has none
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", CkptWarning)
        warnings.showwarning = _show_warning
        code = _run(arguments)
    signals.ignore_signals()
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        result = cli.main(
            args=None if arguments is None else list(arguments), prog_name="vraxion-ckpt", standalone_mode=False
        )
        if sys.stdout is not None:
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "vraxion-ckpt"
        _say("error", f"{error.format_message()}\n  → see `{command} --help`", "red")
        return UsageError.exit_code
    except CkptError as error:
        _debug()
        _say("error", str(error), "red")
        return error.exit_code
    except signals.Interrupted as stop:
        return _stopped(stop.number)
    except click.Abort:
        return _stopped(signal.SIGINT)
    except BrokenPipeError:
        _drop_output()  # whoever read it has enough
        return 0
    except OSError as error:
        _debug()
        _drop_output()
        _say("error", str(StorageError.from_os_error(error, error.filename or "the output")), "red")
        return StorageError.exit_code
    except Exception as error:
        _debug()
        _say("internal error", f"{type(error).__name__}: {error}", "red")
        _say("", "  → please report it; VRAXION_CKPT_DEBUG=1 shows where it happened", "")
        return _INTERNAL_ERROR


def _stopped(number: int) -> int:
    _say("interrupted" if number == signal.SIGINT else "terminated", "no unfinished result is left", "red")
    return 128 + number


@contextmanager
def _unless_too_late(target: str) -> Iterator[None]:
    """End with 0, and say so, where a signal comes when the target is already in its new state."""
    try:
        yield
    except signals.Interrupted:
        from vraxion_ckpt.transaction import committed

        if Path(os.path.realpath(target)) not in committed:
            raise
        _say("warning", f"the signal came too late: {target} was written", "yellow")
        raise click.exceptions.Exit(0) from None


def _drop_output() -> None:
    """Point standard output nowhere, so that the interpreter does not fail on what is left of it at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _debug() -> None:
    if os.environ.get("VRAXION_CKPT_DEBUG"):
        traceback.print_exc()


def _say(label: str, message: str, colour: str) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text(f"{label}: ", style=f"bold {colour}") if label else Text()
    console = Console(stderr=True)
    # A terminal would break lines within words; a log keeps them whole.
    console.print(text + Text(message), soft_wrap=not console.is_terminal)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    context = click.get_current_context(silent=True)
    if not (context and context.find_root().params.get("quiet")):
        _say("warning", str(message), "yellow")


def _as_json(option: _F) -> _F:
    return click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")(option)


def _read_options(command: _F) -> _F:
    for option in (
        click.option("--from", "from_", metavar="F[:k=v]", help="Format of the source; found from its content."),
        click.option(
            "--param-names",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Names of the optimizer's parameters in its order: one a line, or a JSON list.",
        ),
        click.option(
            "--allow-global",
            "allow_globals",
            multiple=True,
            allow_from_autoenv=False,  # what may be loaded is said in the call, never by the surroundings
            metavar="NAME",
            help="A class the source's pickle may use, by full name; repeatable.",
        ),
    ):
        command = option(command)
    return command


def _chain_options(command: _F) -> _F:
    for option in (
        click.option(
            "--losses",
            type=click.Choice(["raise", "warn", "ignore"]),
            default="raise",
            show_default=True,
            help="What to do about what the target format cannot hold.",
        ),
        click.option(
            "--optimizer",
            type=click.Choice(["keep", "drop"]),
            default="keep",
            show_default=True,
            help="Carry the optimizer's state along, or leave it behind.",
        ),
        click.option(
            "-t",
            "--transform",
            "transforms",
            multiple=True,
            metavar="NAME[:k=v,…]",
            help="A step of the chain; repeatable.",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "VRAXION_CKPT"})
@click.version_option(__version__, prog_name="vraxion-ckpt")
@click.option("-q", "--quiet", is_flag=True, help="Print no summary and no warnings.")
@click.option("-v", "--verbose", is_flag=True, help="Also print what each transform did.")
def cli(quiet: bool, verbose: bool) -> None:
    """Offline surgery on the checkpoints of mixture-of-experts models.

    Convert between formats, turn a single head into experts, plan and carry out splits: the optimizer state goes along,
    and what cannot be done right is refused.
    """


@cli.command(short_help="Convert between formats, through a chain of transforms.")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@_chain_options
@click.option(
    "--to", metavar="F[:k=v]", help="Format of the target; follows from its name: .pt, .safetensors, or / at the end."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing target, in one step, at the end.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@_read_options
@_as_json
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
    _must_exist(src)
    from vraxion_ckpt.cli import show
    from vraxion_ckpt.pipeline import convert as run

    names = _load_names(param_names)
    with _unless_too_late(dst):
        done = run(src, dst, param_names=names, **options)
        _tell(context, done, show.summary_facts if as_json else None, show.summary)


@cli.command(short_help="Change a checkpoint in place, through a chain of transforms.")
@click.argument("path", type=click.Path())
@_chain_options
@click.option("--to", metavar="F[:k=v]", help="The same format, with options for writing.")
@click.option("--keep-old", is_flag=True, help="Leave the previous state beside it, as PATH.old.")
@click.option("--dry-run", is_flag=True, help="Say which files would be written and removed, and write nothing.")
@_read_options
@_as_json
@click.pass_context
def edit(context: click.Context, /, path: str, param_names: Path | None, as_json: bool, **options: Any) -> None:
    """Run a chain of transforms on PATH where it lies: it is in the old state or in the new one, at every moment.

    Of a modular directory, only the files that change are written. Without -t, it only cleans up what a killed run
    has left.

    \b
    vraxion-ckpt edit run_modular/ -t arc_meta:visits=visits.json
        -t mitosis_split:noise=0
    """  # noqa: D301 - click reads the escape
    _must_exist(path)
    from vraxion_ckpt.cli import show
    from vraxion_ckpt.inplace import edit as run

    names = _load_names(param_names)
    with _unless_too_late(path):
        done = run(path, param_names=names, **options)
        _tell(context, done, show.edit_facts if as_json else None, show.edited)


def _tell(
    context: click.Context, done: _S, facts: Callable[[_S], dict[str, Any]] | None, text: Callable[..., None]
) -> None:
    """Print a summary, as JSON if `facts` is given; if that fails, say that the work is done all the same."""
    options = context.find_root().params
    try:
        if facts is not None:
            _print_json(facts(done))
        elif not options["quiet"]:
            text(done, verbose=options["verbose"])
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        what = "nothing was to be written" if done.dry_run else f"{done.target} was written"
        raise StorageError(f"{what}, but not this summary: {error.strerror}", path="the output") from error


@cli.command(short_help="Show what a checkpoint is and holds.")
@click.argument("path", type=click.Path())
@_read_options
@_as_json
def inspect(path: str, param_names: Path | None, as_json: bool, **options: Any) -> None:
    """Show what PATH is: experts, ring, optimizer and how it is bound, history."""
    _must_exist(path)
    from vraxion_ckpt.cli import show
    from vraxion_ckpt.reading import inspect as look

    facts = show.inspection_facts(look(path, param_names=_load_names(param_names), **options))
    if as_json:
        _print_json(facts)
    else:
        show.inspection(facts)


@cli.command(short_help="List formats, transforms and probes.")
@_as_json
def plugins(as_json: bool) -> None:
    """List formats and transforms, and the package each comes from."""
    from vraxion_ckpt.cli import show

    facts = show.plugin_facts()
    if as_json:
        _print_json(facts)
    else:
        show.plugins(facts)


@cli.command(short_help="Show a plugin's options.")
@click.argument("name")
@_as_json
def describe(name: str, as_json: bool) -> None:
    """Show the options of one format or transform: type, default, meaning."""
    from vraxion_ckpt.cli import show

    facts = show.description_facts(name)
    if as_json:
        _print_json(facts)
    else:
        show.description(facts)


@cli.command(short_help="Run the whole loop on a real checkpoint.")
@click.argument("directory", type=click.Path(path_type=Path), required=False)
def demo(directory: Path | None) -> None:
    """Run the whole loop on a bundled real checkpoint, and prove what it says.

    Results go to DIRECTORY, or to a new temporary one. Those of an earlier demo are replaced.
    """
    if directory is not None and directory.exists() and not directory.is_dir():
        raise UsageError("is no directory", path=directory)
    from vraxion_ckpt.cli.demo import run

    run(directory)


def _must_exist(path: str) -> None:
    """Refuse a missing source before torch is imported."""
    if not Path(path).exists():
        raise UsageError("no such file or directory", path=path)


def _load_names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UsageError(f"--param-names: {reason}", path=path) from error
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    from vraxion_ckpt import jsonfile

    names = jsonfile.loads(text, path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError("--param-names: must be a list of names", path=path)
    return list(names)


def _print_json(facts: Any) -> None:
    click.echo(json.dumps(_finite(facts), indent=2, default=str, allow_nan=False))


def _finite(facts: Any) -> Any:
    """Return plain data with text for the numbers that JSON does not know."""
    if isinstance(facts, float) and not math.isfinite(facts):
        return str(facts)
    if isinstance(facts, dict):
        return {key: _finite(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [_finite(value) for value in facts]
    return facts
