"""The command line: parse arguments, call the library, print the result.

Data goes to stdout, everything else to stderr. Only commands that need torch import it.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

import click

from vraxion_ckpt._version import __version__
from vraxion_ckpt.cli import about, change, completion, look
from vraxion_ckpt.cli.command import Program, exit_at_closed_pipe, follow_global_options, global_options
from vraxion_ckpt.cli.output import drop_output, say, show_warning
from vraxion_ckpt.errors import CkptError, CkptWarning, OutOfMemoryError, StorageError, UsageError, is_out_of_memory
from vraxion_ckpt.support import signals

_INTERNAL_ERROR = 70
# Objects made between two garbage collections. With the usual 700, they take a tenth of a short command.
_NEW_OBJECTS = 200_000


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, and exit with the code of the result or error."""
    signals.raise_on_signals()
    gc.set_threshold(_NEW_OBJECTS)
    atexit.register(gc.freeze)  # else Python would collect every object of torch when it ends
    try:
        code = _run_with_warnings(arguments)
        signals.ignore_signals()
    except signals.Interrupted as stop:
        code = _stopped(stop.number)
    sys.exit(code)


def _run_with_warnings(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the terminal lacks must not be errors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", CkptWarning)
        warnings.showwarning = show_warning
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        result = cli.main(
            args=None if arguments is None else list(arguments), prog_name="vraxion-ckpt", standalone_mode=False
        )
        with exit_at_closed_pipe():
            if sys.stdout is not None:
                sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "vraxion-ckpt"
        say("error", f"{error.format_message()}\n  → see `{command} --help`", "red")
        return UsageError.exit_code
    except CkptError as error:
        _debug()
        notes = [f"  → {note}" for note in getattr(error, "__notes__", ())]
        say("error", "\n".join([str(error), *notes]), "red")
        return error.exit_code
    except click.Abort:
        return _stopped(signal.SIGINT)
    except OSError as error:
        _debug()
        drop_output()
        say("error", str(StorageError.from_os_error(error, error.filename or "the output")), "red")
        return StorageError.exit_code
    except Exception as error:
        _debug()
        if is_out_of_memory(error):
            drop_output()
            say("error", str(OutOfMemoryError()), "red")
            return OutOfMemoryError.exit_code
        say("internal error", f"{type(error).__name__}: {error}", "red")
        say("", "  → please report it; VRAXION_CKPT_DEBUG=1 prints the traceback", "")
        return _INTERNAL_ERROR


def _stopped(number: int) -> int:
    say("interrupted" if number == signal.SIGINT else "terminated", "no unfinished result is left", "red")
    return 128 + number


def _debug() -> None:
    if os.environ.get("VRAXION_CKPT_DEBUG"):
        traceback.print_exc()


@click.group(
    cls=Program, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "VRAXION_CKPT"}
)
@click.version_option(__version__, prog_name="vraxion-ckpt")
@global_options
@click.pass_context
def cli(context: click.Context, /, **_: bool) -> None:
    """Offline surgery on checkpoints of models with a ring-routed head of experts.

    Convert between formats, turn a single head into experts, plan and carry out splits. The optimizer state is carried
    along. Operations that would give an inconsistent checkpoint are refused.

    The options -q, -v, --no-progress and --json may be given before or after the command.
    """
    follow_global_options(context)


for _command in (*change.CHANGE_COMMANDS, *look.LOOK_COMMANDS, *about.ABOUT_COMMANDS, *completion.COMPLETION_COMMANDS):
    cli.add_command(_command)
