"""Shell completion: the scripts to source, and the completions for plugins and their options.

A script runs this command whenever the completion key is pressed. It must print nothing but the completions, even if an
error occurs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click
from click.shell_completion import (
    CompletionItem,
    ShellComplete,
    add_completion_class,
    split_arg_string,
)

from vraxion_ckpt.cli.command import command
from vraxion_ckpt.errors import UsageError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from vraxion_ckpt.plugins.discovery import Registered
    from vraxion_ckpt.plugins.options import Plugin

_COMMAND = "vraxion-ckpt"
_VARIABLE = "_VRAXION_CKPT_COMPLETE"


# --- completions of plugins and options ---


def complete_transform(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Complete the name of a transform and, after ``NAME:``, its options."""
    from vraxion_ckpt.plugins.discovery import registry

    return _name_and_options(_usable(registry().transforms), incomplete)


def complete_format(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Complete the name of a format and, after ``NAME:``, its options."""
    from vraxion_ckpt.plugins.discovery import registry

    return _name_and_options(_usable(registry().adapters), incomplete)


def complete_plugin(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Complete the name of a format or transform."""
    from vraxion_ckpt.plugins.discovery import registry

    plugins = {**_usable(registry().adapters), **_usable(registry().transforms)}
    return [
        CompletionItem(name, help=plugin.summary())
        for name, plugin in sorted(plugins.items())
        if name.startswith(incomplete)
    ]


def _usable(offers: Mapping[str, Sequence[Registered[Any]]]) -> dict[str, type[Plugin]]:
    return {name: found[0].plugin for name, found in offers.items() if len(found) == 1}


def _name_and_options(plugins: Mapping[str, type[Plugin]], text: str) -> list[CompletionItem[str]]:
    name, colon, options = text.partition(":")
    if colon:
        return _options(name, plugins[name].model_fields, options) if name in plugins else []
    items = []
    for known, plugin in sorted(plugins.items()):
        if known.startswith(name):
            colon = ":" if known == name and plugin.model_fields else ""
            items.append(CompletionItem(known + colon, help=plugin.summary(), open=bool(plugin.model_fields)))
    return items


def _options(name: str, fields: Mapping[str, FieldInfo], text: str) -> list[CompletionItem[str]]:
    """Complete the last item of ``key=value,key=value``: the name of an unused option, or a value."""
    from vraxion_ckpt.plugins.options import parse_call

    done, comma, last = text.rpartition(",")
    try:
        _, used = parse_call(f"{name}:{done}")
    except UsageError:  # the comma is inside a list or quotes
        return []
    start = f"{name}:{done}{comma}"
    key, equals, value = last.partition("=")
    if not equals:
        return [
            CompletionItem(f"{start}{free}=", help=field.description, open=True)
            for free, field in fields.items()
            if free.startswith(key) and free not in used
        ]
    field = fields.get(key.replace("-", "_"))
    if field is None:
        return []
    if Path in (field.annotation, *get_args(field.annotation)):
        return [CompletionItem(value, type="file")]
    choices = [choice for choice in _choices(field.annotation) if choice.startswith(value)]
    return [CompletionItem(f"{start}{key}={choice}", open=True) for choice in choices]


def _choices(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


# --- protocol between the shell and this command ---


class _Completion(ShellComplete):
    """The part of completion that is the same for all shells.

    The script passes the line up to the cursor as ``COMP_LINE``, exactly as typed, because bash would split words at
    ``:`` and ``=``. It receives one line for each completion, with four fields: its kind, the text before it, the text
    to add, and a description. A ``word`` is followed by a space, ``open`` is not. For ``file`` and ``dir``, the shell
    completes the path itself.
    """

    def complete(self) -> str:
        """Print the completions. Return an empty text, because click prints the returned text."""
        with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="surrogateescape") as shell:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)  # imported plugins may print or read, even at exit
            with suppress(BaseException), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                shell.writelines(list(self._lines()))
        return ""

    def _lines(self) -> Iterator[str]:
        args, word = self.get_completion_args()
        incomplete = word
        if word.startswith("--") and "=" in word:
            option, _, incomplete = word.partition("=")
            args.append(option)
        for item in self.get_completions(args, incomplete):
            if item.type in ("file", "dir"):
                kind, there, following = item.type, word.removesuffix(item.value), item.value
            elif item.value.startswith(incomplete):
                kind, there, following = "open" if item.open else "word", word, item.value[len(incomplete) :]
            else:
                continue
            yield "\x1f".join((kind, there, following, " ".join((item.help or "").split()))) + "\n"

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the arguments before the cursor, and the word that ends at the cursor."""
        # Without the added character, an empty last word would be lost.
        *words, last = split_arg_string(os.environ["COMP_LINE"] + "|")
        return words[1:], last[:-1]


@add_completion_class
class _Bash(_Completion):
    """Bash replaces the text after the last ``:`` or ``=``. It passes that text as the second argument."""

    name = "bash"
    source_template = r"""
%(complete_func)s() {
    local kind there following about
    COMPREPLY=()
    while IFS=$'\x1f' read -r kind there following about; do
        case $kind in
            file) compopt -o default ;;
            dir) compopt -o dirnames ;;
            open) compopt -o nospace; COMPREPLY+=("$2$following") ;;
            word) COMPREPLY+=("$2$following") ;;
        esac
    done <<< "$(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" %(complete_var)s=bash_complete \
        "${1/#\~\//$HOME/}" 2> /dev/null < /dev/null)"
}
complete -o nosort -F %(complete_func)s %(prog_name)s
""".lstrip()


@add_completion_class
class _Zsh(_Completion):
    """Zsh keeps the typed text and appends to it."""

    name = "zsh"
    source_template = r"""
#compdef %(prog_name)s
%(complete_func)s() {
    local line
    local -a fields words_found words_shown open_found open_shown
    for line in "${(@f)$(env COMP_LINE="${(j: :)words[1,CURRENT-1]} $QIPREFIX$PREFIX" \
        %(complete_var)s=zsh_complete ${(Q)~words[1]} 2> /dev/null < /dev/null)}"; do
        fields=("${(@ps:\x1f:)line}")
        case $fields[1] in
            file) compset -P "${(b)fields[2]}"; _files ;;
            dir) compset -P "${(b)fields[2]}"; _files -/ ;;
            open) open_found+=("$fields[3]"); open_shown+=("$fields[2]$fields[3]${fields[4]:+  -- $fields[4]}") ;;
            word) words_found+=("$fields[3]"); words_shown+=("$fields[2]$fields[3]${fields[4]:+  -- $fields[4]}") ;;
        esac
    done
    (( $#words_found + $#open_found )) || return
    IPREFIX+=$PREFIX
    PREFIX=
    (( $#words_found )) && compadd -l -V words -d words_shown -a words_found
    (( $#open_found )) && compadd -l -V open -S '' -d open_shown -a open_found
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
""".lstrip()


@add_completion_class
class _Fish(_Completion):
    """Fish expects whole words. It adds no space after ``=`` or ``:``."""

    name = "fish"
    source_template = r"""
function %(complete_func)s
    set -l command (string replace -r '^~/' "$HOME/" -- (commandline -op)[1])
    for line in (env COMP_LINE=(commandline -cp | string collect) %(complete_var)s=fish_complete \
            $command 2> /dev/null < /dev/null)
        set -l fields (string split \x1f -- $line)
        switch $fields[1]
            case file
                printf '%%s\n' $fields[2](__fish_complete_path $fields[3])
            case dir
                printf '%%s\n' $fields[2](__fish_complete_directories $fields[3])
            case word open
                printf '%%s%%s\t%%s\n' $fields[2..4]
        end
    end
end
complete --no-files --command %(prog_name)s --arguments '(%(complete_func)s)'
""".lstrip()


# --- the command ---

_SHELLS: dict[str, type[_Completion]] = {kind.name: kind for kind in (_Bash, _Zsh, _Fish)}


@command(short_help="Print the script for completion in a shell.")
@click.argument("shell", type=click.Choice(list(_SHELLS)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that lets SHELL complete commands, options, files, and plugins with their options.

    For bash, write this line into ~/.bashrc:

    \b
    source <(vraxion-ckpt completion bash)

    For zsh, write this line into ~/.zshrc, after compinit:

    \b
    source <(vraxion-ckpt completion zsh)

    For fish, write this line into ~/.config/fish/config.fish:

    \b
    vraxion-ckpt completion fish | source
    """  # noqa: D301 - click reads the escape
    script = _SHELLS[shell](context.find_root().command, {}, _COMMAND, _VARIABLE).source()
    click.echo(script, nl=False)


COMPLETION_COMMANDS = (completion,)
