"""Run the blocks of the README and of the manual as a reader would: copied in order into a fresh clone.

What a page may contain:

* A ``sh`` block is run by bash and a ``python`` block by Python, each in its own process, in the order of the page, in
  the root of a clone. The package is installed and its environment is active. If a command fails, the page fails,
  unless the block expects it: ``COMMAND || echo "exit code $?"``.
* A ``text`` block right after such a block shows all of its output, stdout and stderr. A block without one prints
  nothing. ``…`` stands for output that varies (a time, a folder): any text within a line, or any number of lines if it
  stands alone on a line (``...`` then means the same).
* A block whose first line is a comment with a file name, ``# my_package/scale.py``, is that file. It is not run by
  itself; a later block must use it.
* ``<!-- not run: REASON -->`` above a block says why it is not run.
* A page writes only into its own folder below ``build``, so that all pages can be followed in one clone.

``python tests/tools/blocks.py docs/tutorial.md`` replaces the shown output of a page by the current output. Lines that
still match stay as they are. Read the difference before you commit it.
"""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import forked
from support import ROOT

_MARKED = r"(?:^<!-- not run:(?P<reason>(?:(?!-->).)*)-->\n\n?)?"
_SHOWN = r"(?:\n*^```text\n(?P<output>.*?)^```$)?"
_BLOCK = re.compile(rf"{_MARKED}^```(?P<language>[a-z]+)\n(?P<text>.*?)^```$\n?{_SHOWN}", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w./-]+\.\w+)\n")
_COMMANDS = ("cookiecutter", "pip", "pytest")
_ANY_LINES = ("…", "...")
_NO_CLONE = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        output: the output that the page shows.
        span: where the page shows it; empty, and after the block, if the page shows none.
        file: the name of the file, if the block is one.
        not_run: why the block is not run.
    """

    line: int
    language: str
    text: str
    output: str
    span: tuple[int, int]
    file: str | None
    not_run: str | None

    @property
    def is_run(self) -> bool:
        return self.language in ("sh", "python") and self.file is None and self.not_run is None


def blocks(page: str) -> list[Block]:
    """Return a page's ``sh`` and ``python`` blocks, and its blocks that are files."""
    found = []
    for match in _BLOCK.finditer(page):
        named = _FILE.match(match["text"])
        if match["language"] in ("sh", "python") or named:
            found.append(
                Block(
                    line=page.count("\n", 0, match.start("text")),
                    language=match["language"],
                    text=match["text"],
                    output=match["output"] or "",
                    span=match.span("output") if match["output"] is not None else (match.end(), match.end()),
                    file=named[1] if named else None,
                    not_run=match["reason"] and match["reason"].strip(),
                )
            )
    return found


class Clone:
    """A copy of a clone in a folder with a short name, and an environment in which the package is installed.

    The environment borrows torch and the other dependencies. Packages that a block installs go into the environment.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "clone"
        shutil.copytree(ROOT, self.root, ignore=_NO_CLONE)
        environment = folder / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        binaries = environment / "bin"
        (packages,) = environment.glob("lib/python*/site-packages")
        lent = sysconfig.get_path("purelib")
        (packages / "lent.pth").write_text(f"import site; site.addsitedir({lent!r})\n")
        for name in _COMMANDS:
            command = binaries / name
            command.write_text(
                f"#!{binaries}/python\nimport runpy; runpy.run_module({name!r}, None, '__main__', True)\n"
            )
            command.chmod(0o755)
        forked.install(binaries / "vraxion-ckpt", packages)
        self.environment = {
            "PATH": f"{binaries}:/usr/bin:/bin",
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "COLUMNS": "80",
            "NO_COLOR": "1",
            "OMP_NUM_THREADS": "1",  # small models, and other tests run at the same time
            # No network: everything that a block installs is local.
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def run(self, block: Block) -> tuple[int, str]:
        """Run a block. Return its exit code, and its stdout and stderr interleaved as on a terminal."""
        command = ["bash", "-eu", "-c", block.text] if block.language == "sh" else ["python", "-"]
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment,
            input=block.text if block.language == "python" else "",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())

    def follow(self, page: str) -> Iterator[tuple[Block, int, str]]:
        """Write a page's files and run its blocks in order. Yield each block that is run, its exit code and output."""
        for block in blocks(page):
            if block.file is not None:
                path = self.root / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
            elif block.is_run:
                yield (block, *self.run(block))


def hold(page: Path, fresh: Clone) -> None:
    """Follow a page in a clone, and compare the output of each block with the page.

    Raises:
        AssertionError: a block fails, or prints something else.
    """
    for block, code, printed in fresh.follow(page.read_text()):
        where = f"{page.name}, line {block.line}"
        assert code == 0, f"{where}: exit code {code}\n{printed}"
        shown = block.output.splitlines()
        compared = difflib.unified_diff(shown, printed.splitlines(), "shown", "printed", lineterm="")
        assert fits(block.output, printed), "\n".join([f"{where} prints something else", *compared])


@contextmanager
def clone() -> Iterator[Clone]:
    """Make a fresh clone. Its path is short, because it appears in output that is wrapped at 80 columns."""
    with tempfile.TemporaryDirectory(prefix="c") as folder:
        yield Clone(Path(folder))


def fits(shown: str, printed: str) -> bool:
    """Return whether the shown output matches the printed one."""
    pattern = "".join(_pattern(line) for line in shown.splitlines())
    return re.fullmatch(pattern, printed) is not None


def _pattern(line: str) -> str:
    if line in _ANY_LINES:
        return r"(?:.*\n)*"
    return "[^\n]*".join(map(re.escape, line.rstrip().split("…"))) + "\n"


def with_what_is_printed(page: str) -> str:
    """Return a page with the current output of its blocks."""
    with clone() as fresh:
        for block, code, printed in reversed(list(fresh.follow(page))):
            if code:
                raise SystemExit(f"line {block.line}: exit code {code}\n{printed}")
            if not fits(block.output, printed):
                known = [line for line in block.output.splitlines() if line not in _ANY_LINES]
                lines = [next((k for k in known if fits(k, f"{line}\n")), line) for line in printed.splitlines()]
                shown = "".join(f"{line}\n" for line in lines).replace(str(fresh.root), "…")
                start, end = block.span
                is_shown = page[:start].endswith("```text\n")
                page = page[:start] + (shown if is_shown else f"\n```text\n{shown}```\n") + page[end:]
    return page


if __name__ == "__main__":
    for name in sys.argv[1:]:
        place = Path(name)
        place.write_text(with_what_is_printed(place.read_text()))
