"""The structure that the code promises: imports go one way, and some doors are the only ones."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "vraxion_ckpt").glob("*.py"))
PLUGINS = sorted([*(ROOT / "adapters").rglob("*.py"), *(ROOT / "transforms").rglob("*.py")])
CLI = sorted((ROOT / "vraxion_ckpt" / "cli").glob("*.py"))

# From the ground up; a module imports only what stands before it.
FLOORS = [
    "_version",
    "printable",
    "errors",
    "sources",
    "textfile",
    "jsonfile",
    "yamlfile",
    "facts",
    "disk",
    "signals",
    "plugin_calls",
    "progress",
    "manifest",
    "transaction",
    "commit",
    "container",
    "ring",
    "balance",
    "head_names",
    "order_rules",
    "model",
    "plain",
    "trainers",
    "buffers",
    "assignment",
    "parameter_order",
    "expert_health",
    "torch_optimizer",
    "binding",
    "compare",
    "surgery",
    "placement",
    "companions",
    "following",
    "checkpoint_types",
    "lent_tensors",
    "invariants",
    "options",
    "adapter",
    "adapter_calls",
    "transform",
    "hookspecs",
    "plugins",
    "catalogue",
    "rehearsal",
    "torchfile",
    "tensorfile",
    "payload",
    "document",
    "plan",
    "visits",
    "reading",
    "signs",
    "inspection",
    "matching",
    "measure",
    "changes",
    "difference",
    "findings",
    "optimizer_findings",
    "checking",
    "targets",
    "summary",
    "judging",
    "pipeline",
    "inplace",
    "variables",
    "recipe",
    "reporting",
    "schemas",
    "testing",
    "cli",
]


def imports(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports, as far as they are ours."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0].startswith("vraxion_ckpt")}


def core_modules(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("vraxion_ckpt.")} & set(FLOORS)


def test_every_core_module_has_its_floor():
    assert {path.stem for path in CORE} - {"__init__"} | {"cli", "testing", "reporting"} == set(FLOORS)


@pytest.mark.parametrize("path", [p for p in CORE if p.stem != "__init__"], ids=lambda path: path.stem)
def test_imports_go_one_way(path):
    below = FLOORS[: FLOORS.index(path.stem)]
    assert core_modules(path) <= set(below)


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_plugins_import_the_core_and_never_each_other_or_the_commands(path):
    others = {name for name in imports(path) if name.startswith(("vraxion_ckpt_adapters", "vraxion_ckpt_transforms"))}
    assert not {name for name in others if name.split(".")[1] != path.parent.name}  # a package has several modules
    assert not core_modules(path) & {"reading", "targets", "summary", "pipeline", "inplace", "cli"}


def test_the_core_names_no_plugin():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vraxion_ckpt"]
    for path in CORE:
        tree = ast.parse(path.read_text())
        names = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not names & set(table), path


@pytest.mark.parametrize("module", [*FLOORS[1 : FLOORS.index("container") + 1], "rehearsal"])
def test_the_lower_floors_do_without_torch(module):
    script = f"import sys, vraxion_ckpt.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_one_module_alone_opens_and_writes_torch_files():
    for path in [*CORE, *CLI, *PLUGINS]:
        calls = {
            f"{node.func.value.id}.{node.func.attr}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        }
        used = calls & {"torch.load", "torch.save", "pickle.load", "pickle.loads"}
        assert used == ({"torch.load", "torch.save"} if path.stem == "torchfile" else set()), path


def test_one_module_alone_calls_adapters():
    """There, what they print is redirected, and what they raise or return wrongly names them."""
    methods = {"detect", "is_directory", "read", "examine", "dialect", "losses", "held", "write", "size"}
    methods |= {"foreign_files", "parts", "unseen", "read_over"}
    for path in [*CORE, *CLI]:
        used = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "adapter"
        }
        assert (used & methods == methods) if path.stem == "adapter_calls" else not used & methods, path


def test_the_package_exports_what_it_says_and_nothing_twice():
    import vraxion_ckpt

    assert vraxion_ckpt.__all__ == sorted(set(vraxion_ckpt.__all__))
    for name in vraxion_ckpt.__all__:
        assert getattr(vraxion_ckpt, name) is not None
    docstring = vraxion_ckpt.__doc__ or ""
    for module in set(FLOORS) - {"_version"}:
        assert f"`{module}`" in docstring


def test_the_error_tree_in_the_docstring_is_the_real_one():
    from vraxion_ckpt import errors

    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.CkptError) and "exit_code" in vars(value):
            line = next(
                line for line in (errors.__doc__ or "").splitlines() if f" {name} " in f" {line.strip('│├└─ ')} "
            )
            assert f" {value.exit_code}" in line
