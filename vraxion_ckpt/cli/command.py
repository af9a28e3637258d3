"""The base class of commands. It accepts global options after the command, and explains misplaced options."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import click

from vraxion_ckpt.cli import output
from vraxion_ckpt.recipes.option_keys import RECIPE_KEYS
from vraxion_ckpt.support import progress

_F = TypeVar("_F", bound=Callable[..., Any])

# --json is not in this list, because only some commands have it.
_AFTER_EVERY_COMMAND = ("quiet", "verbose", "no_progress")


class _Command(click.Command):
    """A command that also accepts the global options after its name."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        return params if ctx.parent is None else [*params, *map(_repeated, _global_options(ctx))]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(_where_it_belongs(error, ctx), ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.parent is not None and ctx.find_root().params["as_json"] and not _has(self, "--json"):
            raise click.UsageError(_other_commands("--json", ctx), ctx)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        if ctx.parent is not None:
            names = ", ".join(option.opts[0] for option in _global_options(ctx))
            formatter.write_paragraph()
            formatter.write_text(f"The global options {names} may also be given here.")


class Program(_Command, click.Group):
    """The program, with its commands and the global options."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with exit_at_closed_pipe():  # --help and --version print here
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with exit_at_closed_pipe():
            return super().invoke(ctx)


@contextmanager
def exit_at_closed_pipe() -> Iterator[None]:
    """Exit with the code for SIGPIPE if standard output is a closed pipe.

    click and rich would exit with 1, but `check` and `diff` use 1 for their results.
    """
    try:
        yield
    except (BrokenPipeError, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(
            stop.__context__, BrokenPipeError
        ):  # rich turns a BrokenPipeError into SystemExit
            raise
        output.drop_output()
        raise click.exceptions.Exit(128 + signal.SIGPIPE) from None


command = partial(click.command, cls=_Command)


def add_options(command: _F, *options: Callable[[_F], _F]) -> _F:
    """Apply option decorators to a command, in order. ``--help`` lists the last one first."""
    for option in options:
        command = option(command)
    return command


def global_options(group: _F) -> _F:
    """Add the global options. ``--json`` is refused before a command that does not have it."""
    return add_options(
        group,
        click.option(
            "--json",
            "as_json",
            is_flag=True,
            allow_from_autoenv=False,
            help="Print the result as JSON, for commands that have --json.",
        ),
        click.option("--no-progress", is_flag=True, help="Show no progress bars. Logs and pipes never have them."),
        click.option("-v", "--verbose", is_flag=True, help="Also print what each transform did."),
        click.option("-q", "--quiet", is_flag=True, help="Print no summary and no warnings."),
    )


def follow_global_options(ctx: click.Context) -> None:
    """Turn progress bars on or off, as the global options say."""
    given = ctx.find_root().params
    progress.wanted = not (given["quiet"] or given["no_progress"])


def _global_options(ctx: click.Context) -> list[click.Option]:
    options = (option for option in ctx.find_root().command.params if isinstance(option, click.Option))
    return [option for option in options if option.name in _AFTER_EVERY_COMMAND]


def _repeated(option: click.Option) -> click.Option:
    """Return a hidden option for a command. The hidden option sets the global option of the same name."""
    return click.Option(
        option.opts,
        is_flag=True,
        hidden=True,
        expose_value=False,
        allow_from_autoenv=False,
        callback=_set_globally,
        help=option.help,
    )


def _set_globally(ctx: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        ctx.find_root().params[str(option.name)] = True
        follow_global_options(ctx)


# --- options in the wrong place ---


def _where_it_belongs(error: click.NoSuchOption, ctx: click.Context) -> str:
    name, root = error.option_name, ctx.find_root()
    owners = _owners(name, ctx)
    if ctx is root and owners:
        return f"{name} belongs after the command; {_have_it(owners)}"
    if ctx is not root and ctx.command.name == "run" and name in RECIPE_KEYS:
        return f"`run` has no option {name}: write it into the recipe, as `{RECIPE_KEYS[name]}`"
    if owners:
        return _other_commands(name, ctx)
    if _has(root.command, name):
        return f"{name} belongs before the command: `{root.info_name} {name}`"
    more = f"; did you mean {' or '.join(error.possibilities)}?" if error.possibilities else ""
    return f"no such option: {name}{more}"


def _other_commands(option: str, ctx: click.Context) -> str:
    return f"`{ctx.command.name}` has no option {option}; {_have_it(_owners(option, ctx))}"


def _owners(option: str, ctx: click.Context) -> list[str]:
    """Return the names of the commands that have an option."""
    program = ctx.find_root().command
    commands = program.commands if isinstance(program, click.Group) else {}
    return [name for name, each in commands.items() if _has(each, option)]


def _has(command: click.Command, option: str) -> bool:
    return any(option in (*param.opts, *param.secondary_opts) for param in command.params)


def _have_it(names: list[str]) -> str:
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return f"{listed} {'has' if len(names) == 1 else 'have'} it"
