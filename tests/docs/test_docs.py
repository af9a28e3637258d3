"""Every block of the manual runs with the shown output, and the reference is complete.

The docstring of `blocks` describes how pages are run.
"""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import blocks, clone, hold
from support import ROOT

import vraxion_ckpt as vc
from vraxion_ckpt import errors
from vraxion_ckpt.cli import cli, schemas
from vraxion_ckpt.plugins.catalogue import describe_plugin, list_plugins
from vraxion_ckpt.recipes import recipe_model

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
ALL = [README, *PAGES]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", ALL, ids=name_of)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.is_run for b in blocks(page.read_text()))], ids=name_of
)
def test_a_page_can_be_followed_in_a_fresh_clone_and_prints_what_it_shows(page):
    with clone() as fresh:
        hold(page, fresh)


def in_order(page: Path = DOCS / "index.md") -> list[Path]:
    """Return the pages below a page in the order of its tables of contents."""
    trees = re.findall(r"^```\{toctree\}\n(?::[^\n]*\n)*(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    listed = [page.parent / f"{name}.md" for tree in trees for name in tree.split()]
    return [below for each in listed for below in (each, *in_order(each))]


@pytest.mark.slow
def test_all_pages_can_be_followed_in_one_clone_in_the_order_of_the_index():
    pages = [README, *in_order()]
    assert sorted(pages) == sorted({*ALL} - {DOCS / "index.md"})
    with clone() as fresh:
        for page in pages:
            hold(page, fresh)


def test_no_two_pages_write_into_the_same_folder_or_file():
    users: dict[str, set[str]] = {}
    for page in ALL:
        for block in blocks(page.read_text()):
            written = {f"build/{folder}" for folder in re.findall(r"\bbuild/([\w.-]+)", block.text)}
            for name in written | ({block.file} if block.file else set()):
                users.setdefault(name, set()).add(name_of(page))
    assert len(users) > 10
    assert {name: pages for name, pages in users.items() if len(pages) > 1} == {}


@pytest.mark.slow
def test_the_suite_beside_the_transform_notices_a_careless_one():
    page = (DOCS / "reference" / "hooks.md").read_text()
    files = {block.file: block for block in blocks(page) if block.file}
    (suite,) = [block for block in blocks(page) if block.is_run and "test_scale.py" in block.text]
    with clone() as fresh:
        for name, block in files.items():
            careless = block.text.replace("(wide * factor).to(tensor.dtype)", "tensor.mul_(factor)")
            assert (careless != block.text) == (name == "my_package/scale.py")
            (fresh.root / name).parent.mkdir(exist_ok=True)
            (fresh.root / name).write_text(careless)
        code, printed = fresh.run(suite)
    assert code == 1
    assert "wrote into a tensor" in printed


# --- what a page may say ---


@every_page
def test_no_block_escapes(page):
    text = page.read_text()
    fences = re.findall(r"^ *```(?:sh|python)\b", text, re.MULTILINE)
    assert len(fences) == sum(block.language in ("sh", "python") for block in blocks(text))


@every_page
def test_what_is_not_run_has_a_reason(page):
    text = page.read_text()
    reasons = [block.not_run for block in blocks(text) if block.not_run is not None]
    assert len(reasons) == text.count("<!-- not run"), "a mark does not stand right above a block"
    assert all(len(reason.split()) > 2 for reason in reasons)


@every_page
def test_every_file_is_used_by_a_later_block(page):
    found = blocks(page.read_text())
    for number, block in enumerate(found):
        if block.file is not None:
            later = [other for other in found[number + 1 :] if other.is_run or other.file]
            assert any(Path(block.file).stem in other.text for other in later), block.file


@every_page
def test_a_block_leaves_the_shell_as_it_is(page):
    """Tests run the blocks one by one, but readers copy them into one shell."""
    for block in blocks(page.read_text()):
        changes = re.search(r"^\s*(cd|pushd|export|set|exit|exec|trap)\b", block.text, re.MULTILINE)
        assert block.language != "sh" or not changes, f"line {block.line}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_to_be_copied_fits_on_the_page(page):
    for block in blocks(page.read_text()):
        assert max(map(len, block.text.splitlines())) <= 88, f"line {block.line}"


@every_page
def test_links_lead_somewhere_on_disk_too(page):
    """Check links as on GitHub. Sphinx checks those in the built manual."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
        assert (page.parent / target).exists(), target


# --- what else is said ---


@pytest.mark.slow
def test_the_tables_about_optimizers_are_what_is_measured():
    measured = subprocess.run(
        [sys.executable, DOCS / "measure_optimizer.py"], capture_output=True, text=True, check=True
    ).stdout
    page = (DOCS / "explanation" / "optimizer.md").read_text()
    tables = measured.strip().split("\n\n")
    assert len(tables) == 2
    for table in tables:
        assert f"\n{table}\n" in page


def test_the_messages_to_recover_from_are_messages():
    page = (DOCS / "howto" / "recover.md").read_text()
    messages = re.findall(r'^\| "([^"]+)"', page, re.MULTILINE)
    sources = "".join(path.read_text() for path in (ROOT / "vraxion_ckpt").rglob("*.py")) + os.strerror(28)
    assert len(messages) > 5
    assert [message for message in messages if message not in sources] == []


# --- the manual, built ---


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    """Build the manual as `make docs` does, with warnings as errors."""
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("Sphinx is not installed")
    folder = tmp_path_factory.mktemp("manual")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", folder / "trees"]
    done = subprocess.run([*build, DOCS, folder / "html"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def words(page: Path) -> str:
    """Return the text of a built page without tags."""
    body = re.search(r"<article.*?</article>", page.read_text(), re.DOTALL)
    assert body is not None
    return html.unescape(re.sub(r"<[^>]+>", "", body[0]))


@pytest.mark.slow
def test_every_page_is_in_the_manual(manual):
    built = {path.relative_to(manual).with_suffix(".md") for path in manual.rglob("*.html")}
    assert {page.relative_to(DOCS) for page in PAGES} <= built


@pytest.mark.slow
def test_every_command_and_option_is_in_the_reference(manual):
    page = words(manual / "reference" / "commands.html")
    assert len(cli.commands) > 8
    for name, command in cli.commands.items():
        assert f"vraxion-ckpt {name}" in page
        for parameter in command.params:
            for option in parameter.opts:
                assert option in page or option.upper() in page, f"{name} {option}"


@pytest.mark.slow
def test_every_plugin_and_option_is_in_the_reference(manual):
    page = words(manual / "reference" / "plugins.html")
    ours = [entry for entry in list_plugins().plugins if entry.distribution == "vraxion-ckpt"]
    assert {entry.kind for entry in ours} == {"format", "transform", "probe"}
    for entry in ours:
        assert entry.summary in page
        for option in describe_plugin(entry.name).options if entry.kind != "probe" else ():
            assert option.name in page
            assert option.description in page


@pytest.mark.slow
def test_every_hook_is_in_the_reference(manual):
    page = words(manual / "reference" / "hooks.html")
    for hook in ("register_adapters() → list[type[Adapter]]", "register_transforms()", "probe_visits(checkpoint"):
        assert hook in page
    assert "until one returns something other than None" in page


@pytest.mark.slow
def test_every_error_is_in_the_reference_with_its_exit_code(manual):
    page = words(manual / "reference" / "errors.html")
    classes = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.CkptError)]
    raised = [kind for kind in classes if kind.exit_code != errors.CkptError.exit_code]
    assert {kind.exit_code for kind in raised} == set(range(2, 17)), "the page says 2 to 16"
    for kind in raised:
        assert re.search(rf"\b{kind.exit_code}\s+{kind.__name__}\b", page), kind
    for code in (0, 1, 70):
        assert re.search(rf"^\s*{code}\s*$", page, re.MULTILINE), code


@pytest.mark.slow
def test_every_schema_is_in_the_reference_and_can_be_had(manual):
    page, folder = words(manual / "reference" / "schemas.html"), manual / "reference" / "schemas"
    wanted = {**{name: schemas.schema_of(name) for name in schemas.SCHEMAS}, "recipe": recipe_model.json_schema()}
    assert {path.stem for path in folder.iterdir()} == wanted.keys()
    for name, schema in wanted.items():
        assert json.loads((folder / f"{name}.json").read_text()) == schema
        for entry in schema["properties"]:
            assert entry in page


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(manual):
    page = words(manual / "reference" / "python.html")
    for name in set(vc.__all__) - {"__version__", "hookimpl"}:
        assert f"vraxion_ckpt.{name}" in page, name
