"""The blocks of the README and of the manual, run as a reader runs them: copied in order into a fresh clone.

What a page may say, and what it means:

* A ``sh`` block is run by bash and a ``python`` block by Python, each by itself, in the order of the page, in the root
  of a clone, with the package installed and its environment active. A command that fails, fails the page, unless the
  block says so: ``COMMAND || echo "exit code $?"``.
* A ``text`` block right after one shows all that it prints, to stdout and stderr; a block without one prints nothing.
  ``…`` stands for what differs from run to run (a time, a folder): within a line for any text, as a whole line (there,
  ``...`` too) for any lines.
* A block whose first line is a comment with a file's name, ``# my_package/scale.py``, is that file. It is not run by
  itself: a later block has to use it.
* ``<!-- not run: REASON -->`` above a block says why it is not run.

After a change of what is printed, ``python tests/tools/blocks.py docs/tutorial.md`` puts what is printed now into the
page, and leaves the lines alone that still match; read the difference before you believe it.
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
        output: what the page says that it prints.
        span: where in the page that stands; empty, and after the block, if the page says nothing.
        file: the name of the file that it is.
        not_run: why it is not run.
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
    """Find the blocks of a page that are run, are files, or might have been."""
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
    """A copy of what a clone has, in a folder with a short name, and an environment in which it is installed.

    Torch and the rest are lent to the environment, which takes what is installed into it.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "vraxion-ckpt"
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
            "OMP_NUM_THREADS": "1",  # small models, and tests beside this one
            # No network: what is installed is at hand.
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def run(self, block: Block) -> tuple[int, str]:
        """Run a block; return its exit code and what it wrote to stdout and stderr, as it comes on a terminal."""
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
        """Run a page's blocks in order and write its files; yield what each block that is run did."""
        for block in blocks(page):
            if block.file is not None:
                path = self.root / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
            elif block.is_run:
                yield (block, *self.run(block))


def hold(page: Path, fresh: Clone) -> None:
    """Follow a page in a fresh clone, and hold it to what it says.

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
    """Lend a fresh clone. Its path is printed, and must not be so long that lines break there."""
    with tempfile.TemporaryDirectory(prefix="c") as folder:
        yield Clone(Path(folder))


def fits(shown: str, printed: str) -> bool:
    """Tell whether a page shows what was printed."""
    pattern = "".join(_pattern(line) for line in shown.splitlines())
    return re.fullmatch(pattern, printed) is not None


def _pattern(line: str) -> str:
    if line in _ANY_LINES:
        return r"(?:.*\n)*"
    return "[^\n]*".join(map(re.escape, line.rstrip().split("…"))) + "\n"


def with_what_is_printed(page: str) -> str:
    """Return a page with what its blocks print now."""
    with clone() as fresh:
        for block, code, printed in reversed(list(fresh.follow(page))):
            if code:
                raise SystemExit(f"line {block.line}: exit code {code}\n{printed}")
            if not fits(block.output, printed):
                known = [line for line in block.output.splitlines() if line not in _ANY_LINES]
                lines = [next((k for k in known if fits(k, f"{line}\n")), line) for line in printed.splitlines()]
                shown = "".join(f"{line}\n" for line in lines).replace(str(fresh.root), "…")
                start, end = block.span
                page = page[:start] + (shown if block.output else f"\n```text\n{shown}```\n") + page[end:]
    return page


if __name__ == "__main__":
    for name in sys.argv[1:]:
        place = Path(name)
        place.write_text(with_what_is_printed(place.read_text()))
