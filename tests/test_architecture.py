"""The structure that ARCHITECTURE.md describes: rooms, what each may import, and modules with one purpose."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vraxion_ckpt.plugins.discovery import dialects

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vraxion_ckpt"
CORE = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
PLUGINS = sorted([*(ROOT / "adapters").rglob("*.py"), *(ROOT / "transforms").rglob("*.py")])
TOP_LEVEL = {"_version", "errors", "plugin_api", "printable", "wording"}

# The rooms in the order of the data flow. Each may import the rooms that are listed for it, and `errors`, `printable`
# and `wording`.
MAY_IMPORT = {
    "support": set(),
    "commit": {"support"},
    "checkpoint": {"support"},
    "optimizer": {"checkpoint"},
    "experts": {"checkpoint", "optimizer"},
    "formats": {"support", "checkpoint", "optimizer"},
    "plugins": {"support", "checkpoint", "formats"},
    "reading": {"commit", "checkpoint", "optimizer", "plugins"},
    "analysis": {"support", "commit", "checkpoint", "optimizer", "experts", "plugins", "reading"},
    "conversion": {"support", "commit", "checkpoint", "optimizer", "experts", "plugins", "reading"},
    "recipes": {"support", "checkpoint", "optimizer", "experts", "plugins", "reading", "conversion"},
    "reporting": {
        *("support", "commit", "checkpoint", "reading"),
        *("analysis", "conversion"),
    },
    "testing": {"checkpoint", "optimizer", "experts", "plugins", "reading", "conversion"},
    "cli": {
        *("support", "commit", "checkpoint", "formats", "plugins", "reading"),
        *("analysis", "conversion", "recipes", "reporting"),
    },
}
WITHOUT_TORCH = [
    *(
        "errors",
        "printable",
        "wording",
        "support.json_files",
        "support.json_models",
        "support.progress",
        "support.signals",
    ),
    *("support.text_files", "support.yaml_files", "commit.manifest", "commit.staging", "commit.system_calls"),
    *("commit.durability", "commit.file_marks", "commit.journal"),
    *("commit.transaction", "checkpoint.source_files", "formats.torch_archive"),
    *("checkpoint.plain_data", "formats.pickle_scan", "formats.stand_ins", "formats.torch_pickle"),
    *("formats.zip_directory", "formats.zip_layout", "formats.zip_records", "formats.torch_reader"),
    *("formats.safetensors_file", "formats.safetensors_writer", "formats.storage_writer"),
    *("support.checksums", "support.file_bytes", "support.file_copy", "checkpoint.written_files"),
    *("checkpoint.references", "checkpoint.tensor_dict", "checkpoint.tensor_bytes", "checkpoint.shared_memory"),
    *("checkpoint.model", "checkpoint.comparison", "conversion.read_back"),
    "plugins.plugin_calls",
    *("plugins.catalogue", "plugin_api", "reading.opening", "recipes.recipe"),
    *("analysis.inspection", "analysis.checking", "analysis.difference", "conversion.convert", "conversion.edit"),
    *("cli", "cli.show_changes", "cli.show_difference", "cli.show_findings", "cli.show_inspection"),
]


def imports(path: Path) -> set[str]:
    """Return the full names of the modules of ours that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0].startswith("vraxion_ckpt")}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("vraxion_ckpt.")} & MAY_IMPORT.keys()


def test_every_module_is_in_a_room():
    assert {room_of(path) for path in CORE} == MAY_IMPORT.keys() | TOP_LEVEL


def test_a_room_imports_only_rooms_before_it():
    rooms = list(MAY_IMPORT)
    for number, room in enumerate(rooms):
        assert MAY_IMPORT[room] <= set(rooms[:number])


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_what_the_table_says(room):
    found = set().union(*(rooms_imported(path) for path in CORE if room_of(path) == room)) - {room}
    assert found == MAY_IMPORT[room]


@pytest.mark.parametrize(
    "path", [path for path in CORE if room_of(path) in {"errors", "printable", "wording", "_version"}], ids=str
)
def test_errors_import_no_room(path):
    assert not rooms_imported(path)


def test_no_module_imports_itself_through_another():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in CORE}
    graph = {
        name: {found if found in modules else found.rpartition(".")[0] for found in imports(path)} & modules.keys()
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join((*above, name))
        if name not in done:
            for below in sorted(graph[name]):
                visit(below, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_says_in_ten_lines_what_it_is_for(room):
    docstring = importlib.import_module(f"vraxion_ckpt.{room}").__doc__ or ""
    assert 1 <= len(docstring.strip().splitlines()) <= 10


def test_architecture_md_names_every_room_and_what_it_may_import():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    for room, allowed in MAY_IMPORT.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{room}/`"))
        named = {word.strip(" `") for word in row.strip("|").split("|")[-1].split(",")} - {"–"}
        assert named == allowed, room


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_the_command_needs_at_once_does_without_torch(module):
    script = f"import sys, vraxion_ckpt.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_built_in_plugins_are_loaded_without_torch(path):
    """Commands load every plugin, so one that imports torch at once slows down all of them."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts[1:]).removesuffix(".__init__")
    script = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


EXAMPLES = sorted((ROOT / "examples").glob("*/src/**/*.py")) + sorted((ROOT / "examples").glob("*/*/src/**/*.py"))


@pytest.mark.parametrize("path", [*PLUGINS, *EXAMPLES], ids=lambda path: path.stem)
def test_plugins_import_only_the_contract(path):
    text = path.read_text()
    found = re.findall(r"^\s*(?:from|import) (vraxion_ckpt(?:\.\w+)*)\b(?!_)", text, re.MULTILINE)
    assert set(found) <= {"vraxion_ckpt.plugin_api"}
    assert not re.search(r"\w\.dialects\b(?!\.meta|\.{)", text), (
        "an adapter knows its own dialect only: Origin.dialect(name)"
    )


def test_the_contract_exports_what_it_says():
    from vraxion_ckpt import plugin_api

    assert len(plugin_api.__all__) == len(set(plugin_api.__all__))
    public = {name for name in vars(plugin_api) if not name.startswith("_")} - {"annotations", "TYPE_CHECKING"}
    assert public | {"NATIVE_DTYPES"} == set(plugin_api.__all__)
    assert {str(dtype).removeprefix("torch.") for dtype in plugin_api.NATIVE_DTYPES} == plugin_api.NATIVE_DTYPE_NAMES


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_plugins_never_import_each_other(path):
    others = {name for name in imports(path) if name.startswith(("vraxion_ckpt_adapters", "vraxion_ckpt_transforms"))}
    assert not {name for name in others if name.split(".")[1] != path.parent.name}  # a package has several modules


def test_the_core_names_no_plugin():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vraxion_ckpt"]
    for path in CORE:
        if room_of(path) in {"cli", "reporting", "testing"}:
            continue
        tree = ast.parse(path.read_text())
        names = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        if path.name == "payload_dialect.py":
            names -= {"pt"}  # the name of a payload layout in files that were written before
        assert not names & set(table), path


def test_one_module_alone_has_an_unpickler_and_none_calls_torch_for_it():
    for path in [*CORE, *PLUGINS]:
        calls = {
            f"{node.func.value.id}.{node.func.attr}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        }
        used = calls & {"torch.load", "torch.save", "pickle.load", "pickle.loads"}
        assert not used, path
        assert ("pickle.Unpickler" in path.read_text()) <= (path.stem == "torch_pickle"), path


def test_the_core_names_no_trainer():
    """Trainers are declared as data by plugins."""
    declared = dialects()
    words = {word for dialect in declared for word in (dialect.name, *dialect.model_names)} - {"router_map"}
    words |= {key for dialect in declared for key in dialect.requires if not key.isalpha()}
    words |= {dialect.model_key for dialect in declared} - {"model", "state_dict", "module", "net"}
    words |= {"VRAXION's", "wall-clock"}
    assert len(words) > 12
    for path in CORE:
        if room_of(path) != "testing" and path.name != "demo.py":
            assert not [word for word in words if word in path.read_text()], path


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=str)
def test_errors_are_not_changed_after_they_were_built(path):
    if path == PACKAGE / "errors.py":
        return
    changed = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) != "self"
    }
    assert not changed & {"message", "hint", "written", "not_written", "args"}


def test_few_modules_ask_where_a_tensor_lies():
    """References say where tensors lie; the others read their memory."""
    asking = {
        path.stem
        for path in [*CORE, *PLUGINS]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
    }
    assert asking == {"references", "source_files", "comparison"}


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=str)
def test_lists_and_plurals_are_made_in_one_place(path):
    if path == PACKAGE / "wording.py":
        return
    text = path.read_text()
    assert not re.search(r"""['"]e?s['"] \* |, …['"](?!")|in all\)['"]""", text)


def test_one_module_alone_calls_adapters():
    """There, what they print is redirected, and what they raise or return wrongly names them."""
    methods = {"detect", "is_directory", "read", "examine", "dialect", "losses", "held", "write", "size"}
    methods |= {"foreign_files", "output_files", "is_ignored", "read_overlay"}
    for path in CORE:
        if room_of(path) == "testing":
            continue
        used = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "adapter"
        }
        assert (used & methods == methods) if path.stem == "adapter_calls" else not used & methods, path


def public_names(path: Path) -> Iterator[str]:
    """Yield the public functions, classes and constants that a module defines; not the commands of the command line."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}
            names = [] if decorators & {"click.command", "command"} else [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def test_no_two_public_things_of_the_core_share_a_name():
    """A command alone may be called like something else: like the function that it calls."""
    homes: dict[str, set[Path]] = {}
    for path in CORE:
        for name in public_names(path):
            homes.setdefault(name, set()).add(path)
    assert len(homes) > 400
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_the_package_exports_what_it_says_and_nothing_twice():
    import vraxion_ckpt

    assert vraxion_ckpt.__all__ == sorted(set(vraxion_ckpt.__all__))
    for name in vraxion_ckpt.__all__:
        assert getattr(vraxion_ckpt, name) is not None
        assert name in dir(vraxion_ckpt)


def test_the_error_tree_in_the_docstring_is_the_real_one():
    from vraxion_ckpt import errors

    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.CkptError) and "exit_code" in vars(value):
            line = next(
                line for line in (errors.__doc__ or "").splitlines() if f" {name} " in f" {line.strip('│├└─ ')} "
            )
            assert f" {value.exit_code}" in line
