"""Shell completion: requests as a shell makes them, and keys typed in real shells."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from vraxion_ckpt.cli import cli

BIN = Path(sys.executable).parent
OFFERS = """
from vraxion_ckpt.plugin_api import Effect, Transform, hookimpl

class Polite(Transform):
    \"\"\"Do nothing.\"\"\"
    name = "{name}"
    def effect(self):
        return Effect.exact()
    def apply(self, checkpoint):
        return checkpoint

@hookimpl
def register_transforms():
    return [Polite]
"""
PRINTS = """
import atexit, os, sys, warnings
for when in (lambda call: call(), atexit.register):
    when(lambda: print("hello"))
    when(lambda: print("hello", file=sys.stderr))
    when(lambda: os.write(1, b"hello"))
    when(lambda: os.write(2, b"hello"))
warnings.warn("hello")
"""


def offered(*words: str) -> list[str]:
    """Return the completions of the last word."""
    *complete, incomplete = words
    shell = ShellComplete(cli, {}, "vraxion-ckpt", "_VRAXION_CKPT_COMPLETE")
    return [item.value for item in shell.get_completions(complete, incomplete)]


# --- what is offered ---


@pytest.mark.parametrize("command", ["convert", "edit"])
def test_transforms_are_offered_by_name(command):
    assert offered(command, "-t", "") == [
        "arc_meta",
        "experts_to_single",
        "mitosis_split",
        "prune_merge",
        "restore_hibernated",
        "single_to_experts",
    ]
    assert offered(command, "x.pt", "-t", "arc_meta", "--transform", "mito") == ["mitosis_split"]
    assert offered(command, "-t", "nothing_like_it") == []


def test_a_name_that_is_complete_goes_on_with_a_colon_if_there_are_options():
    assert offered("convert", "-t", "mitosis_split") == ["mitosis_split:"]
    assert offered("convert", "-t", "experts_to_single") == ["experts_to_single:"]


def test_options_are_offered_until_they_are_used():
    names = ["parent", "addresses", "meta", "noise", "seed", "optimizer", "foreign_addresses", "allow_empty_parent"]
    names += ["allow_zero", "allow_nan"]
    start = "mitosis_split:"
    assert offered("convert", "-t", start) == [f"{start}{name}=" for name in names]
    assert offered("convert", "-t", f"{start}no") == [f"{start}noise="]
    start = "mitosis_split:noise=0,allow-empty-parent=true,"
    left = [name for name in names if name not in ("noise", "allow_empty_parent")]
    assert offered("convert", "-t", start) == [f"{start}{name}=" for name in left]


def test_a_comma_in_a_list_or_in_quotes_begins_no_option():
    assert offered("convert", "-t", "mitosis_split:addresses=[1,") == []
    assert offered("convert", "-t", 'arc_meta:visits="a,') == []
    start = "mitosis_split:addresses=[1,3-5],"
    assert f"{start}noise=" in offered("convert", "-t", start)
    assert f"{start}addresses=" not in offered("convert", "-t", start)


def test_values_are_offered_where_there_are_only_a_few():
    start = "mitosis_split:noise=0,"
    assert offered("convert", "-t", f"{start}optimizer=") == [f"{start}optimizer=copy", f"{start}optimizer=reset"]
    assert offered("convert", "-t", f"{start}allow_empty_parent=t") == [f"{start}allow_empty_parent=true"]
    assert offered("convert", "-t", f"{start}seed=") == []
    assert offered("convert", "-t", f"{start}no_such_option=") == []


@pytest.mark.parametrize(
    "words", [("convert", "--from"), ("convert", "--to"), ("edit", "--to"), ("inspect", "--from"), ("diff", "--from-b")]
)
def test_formats_are_offered_with_their_options(words):
    names = {text.removesuffix(":") for text in offered(*words, "")}
    assert names == {"modular", "pt", "safetensors"}
    assert offered(*words, "safetensors:weights_only=true,max") == ["safetensors:weights_only=true,max_shard_size="]


def test_describe_is_offered_every_plugin():
    assert {"pt", "safetensors", "arc_meta", "mitosis_split"} <= set(offered("describe", ""))
    assert offered("describe", "arc") == ["arc_meta"]


# --- nothing else is printed ---


def plugin(folder: Path, name: str, code: str) -> None:
    """Install a plugin as a package on Python's path."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[vraxion_ckpt]\n{name} = {name}\n")


def ask(line: str | None, *command: object, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Request completions as a shell's script does."""
    environment = {**os.environ, "_VRAXION_CKPT_COMPLETE": "bash_complete"}
    if line is not None:
        environment["COMP_LINE"] = line
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    asked = [sys.executable, *(map(str, command) if command else ("-m", "vraxion_ckpt.cli"))]
    return subprocess.run(asked, capture_output=True, stdin=subprocess.DEVNULL, text=True, env=environment, check=False)


def test_plugins_that_are_broken_or_print_neither_disturb_nor_take_others_away(tmp_path):
    plugin(tmp_path, "does_not_import", "import no_such_module\n")
    plugin(tmp_path, "asks", "input('how are you?')\n")
    plugin(tmp_path, "prints", PRINTS + OFFERS.format(name="polite_after_all"))
    plugin(tmp_path, "clashes", OFFERS.format(name="arc_meta"))
    done = ask("vraxion-ckpt convert -t ", site=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    entries = [line.split("\x1f") for line in done.stdout.splitlines()]
    assert [(kind, following) for kind, _, following, _ in entries] == [
        ("open", "experts_to_single"),
        ("open", "mitosis_split"),
        ("word", "polite_after_all"),
        ("open", "prune_merge"),
        ("open", "restore_hibernated"),
        ("open", "single_to_experts"),
    ]


@pytest.mark.parametrize("code", ["raise SystemExit('hello')", "os._exit(3)"])
def test_a_plugin_that_ends_the_program_prints_nothing(code, tmp_path):
    plugin(tmp_path, "ends", PRINTS + code)
    done = ask("vraxion-ckpt convert -t mitosis_split:no", site=tmp_path)
    assert "hello" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("line", [None, "vraxion-ckpt convert -t 'a\nb\x1f"])
def test_a_line_that_means_nothing_is_answered_with_nothing(line):
    done = ask(line)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_torch_is_imported_only_to_find_plugins(tmp_path):
    code = (
        "import sys; from pathlib import Path; from vraxion_ckpt.cli import main\n"
        f"try: main(sys.argv[1:])\nfinally: Path({str(tmp_path / 'torch')!r}).write_text(str('torch' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code, "completion", "bash"], check=True, capture_output=True)
    assert (tmp_path / "torch").read_text() == "False"
    assert "completion" in ask("vraxion-ckpt ", "-c", code).stdout
    assert (tmp_path / "torch").read_text() == "False"


def test_a_shell_that_is_not_known_is_refused(cli):
    code, said = cli("completion", "tcsh")
    assert code == 2
    assert "'bash', 'zsh', 'fish'" in said


# --- in real shells ---

SET_UP = {
    "bash": """
        PS1='ready> '
        source <(vraxion-ckpt completion bash)
        tell() { printf '%s\\n' "$READLINE_LINE" > told; }
        bind -x '"\\C-t": tell'
        bind '"\\C-y": insert-completions'
    """,
    "zsh": """
        PS1='ready> '
        autoload -Uz compinit && compinit -u -D
        source <(vraxion-ckpt completion zsh)
        tell() { printf '%s\\n' "$BUFFER" > told }
        zle -N tell
        bindkey '^T' tell
    """,
    "fish": """
        function fish_prompt; printf 'ready> '; end
        vraxion-ckpt completion fish | source
        function tell; printf '%s\\n' (commandline) > told; end
        bind \\ct tell
    """,
}
START = {
    "bash": ("bash", "--noprofile", "--rcfile", ".bashrc", "-i"),
    "zsh": ("zsh", "--no-global-rcs", "-i"),
    "fish": ("fish", "-i"),
}
FILES = {"bash": ".bashrc", "zsh": ".zshrc", "fish": ".config/fish/config.fish"}


class Terminal:
    """A shell with a terminal of its own and a folder as its home."""

    def __init__(self, shell: str, home: Path) -> None:
        if shutil.which(shell) is None:
            pytest.skip(f"{shell} is not installed")
        place = home / FILES[shell]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(SET_UP[shell])
        os.mkfifo(home / "told")
        self._told = os.open(home / "told", os.O_RDWR)
        surroundings = {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "TERM": "xterm", "LANG": "C.UTF-8"}
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(home)
            os.execvpe(START[shell][0], START[shell], surroundings)
        shown = b""
        while b"ready> " not in shown:
            shown += self._read(self._terminal)

    def line_after(self, keys: str) -> str:
        """Type some keys. Return the resulting line."""
        os.write(self._terminal, f"{keys}\x14".encode())
        line = b""
        while not line.endswith(b"\n"):
            line += self._read(self._told)
        return line.decode().removesuffix("\n")

    def _read(self, wanted: int) -> bytes:
        """Read from the pipe or the terminal, and discard other output of the terminal."""
        while True:
            ready, _, _ = select.select([self._terminal, self._told], [], [], 60)
            assert ready, "the shell says nothing any more"
            if wanted in ready:
                return os.read(wanted, 2**16)
            os.read(self._terminal, 2**16)

    def close(self) -> None:
        os.close(self._terminal)
        os.close(self._told)
        os.waitpid(self._pid, 0)


@pytest.fixture
def terminal(tmp_path, request) -> Iterator[Terminal]:
    (tmp_path / "visits of today.json").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vraxion-ckpt").symlink_to(BIN / "vraxion-ckpt")
    opened = Terminal(request.param, tmp_path)
    yield opened
    opened.close()


EVERYWHERE = [
    ("~/bin/vraxion-ckpt conv", "~/bin/vraxion-ckpt convert "),
    ("true && vraxion-ckpt edit x --losses=ig", "true && vraxion-ckpt edit x --losses=ignore "),
    ("vraxion-ckpt inspect vis", "vraxion-ckpt inspect visits\\ of\\ today.json "),
    ("vraxion-ckpt edit -t arc_meta:visits=vis", "vraxion-ckpt edit -t arc_meta:visits=visits\\ of\\ today.json "),
    ("vraxion-ckpt edit --transform=prune_merge:ren", "vraxion-ckpt edit --transform=prune_merge:renumber="),
]
IN_BASH = [
    ("-t a:b -t mitosis_split:addresses=[1,2],no", "-t a:b -t mitosis_split:addresses=[1,2],noise="),
    ("-t mitosis_split:addresses=\\[1,2\\],no", "-t mitosis_split:addresses=\\[1,2\\],noise="),
    ("-t 'mitosis_split:addresses=[1,2],no", "-t 'mitosis_split:addresses=[1,2],noise='"),
    ("-t 'mitosis_split:addresses=[1,2]',no", "-t 'mitosis_split:addresses=[1,2]',noise="),
]


@pytest.mark.slow
@pytest.mark.parametrize("terminal", START, indirect=True)
def test_lines_are_completed(terminal):
    for typed, expected in EVERYWHERE:
        assert terminal.line_after(f"{typed}\t") == expected
        terminal.line_after("\x05\x15")


@pytest.mark.slow
@pytest.mark.parametrize("terminal", ["bash"], indirect=True)
def test_bash_keeps_colons_commas_brackets_and_quotes_as_they_were_typed(terminal):
    for typed, expected in IN_BASH:
        assert terminal.line_after(f"vraxion-ckpt edit {typed}\t") == f"vraxion-ckpt edit {expected}"
        terminal.line_after("\x05\x15")


@pytest.mark.parametrize("terminal", ["bash"], indirect=True)
def test_bash_is_offered_all_that_fits(terminal):
    line = terminal.line_after("vraxion-ckpt edit -t single_to_experts:noise=0,\x19")
    names = ("experts", "route", "seed", "optimizer", "ring_len", "allow_zero", "allow_nan")
    left = " ".join(f"0,{name}=" for name in names)
    assert line == f"vraxion-ckpt edit -t single_to_experts:noise={left} "
