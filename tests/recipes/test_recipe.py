"""Recipes: the same as `convert`, written down; and everything that is wrong with one, at once."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from pathlib import Path

import forked
import jsonschema
import pytest
import yaml
from support import DATA, EXPECTED, ROOT, files_below

import vraxion_ckpt as vc
from vraxion_ckpt.errors import CkptError, LossError, StorageError, UsageError
from vraxion_ckpt.recipes.option_keys import RECIPE_KEYS
from vraxion_ckpt.recipes.recipe_model import json_schema

EXAMPLE = ROOT / "examples" / "refinement"
NAMED = DATA / "named_experts3.pt"


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, with a source and its visits."""
    shutil.copy(DATA / "wallclock_experts3.pt", tmp_path / "in.pt")
    shutil.copy(EXPECTED / "wallclock_experts3.visits.json", tmp_path / "visits.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "recipe.yaml") -> str:
    Path(name).write_text(text)
    return name


def refused(text: str, **options) -> list[str]:
    """Return what is told of a recipe that is refused before anything is read or written."""
    before = files_below(Path.cwd())
    with pytest.raises(UsageError) as caught:
        vc.run(write(text), **options)
    Path("recipe.yaml").unlink()
    assert files_below(Path.cwd()) == before
    return str(caught.value).splitlines()[1:]


FULL = """\
vars: {run: ., noise: 0}
source: ${run}/in.pt
chain:
  - arc_meta: {visits: "${run}/visits.json", output: "${run}/plan.json"}
  - mitosis_split: {noise: "${noise}"}
targets:
  - ${run}/out.pt
  - {path: "${run}/modular/", to: modular, manifest: "${run}/m.json"}
  - path: ${run}/weights.safetensors
    to: safetensors:weights_only=true
    losses: ignore
"""


def test_it_does_what_convert_does():
    done = vc.run(write(FULL))
    chain = [("arc_meta", {"visits": "visits.json"}), "mitosis_split:noise=0"]
    vc.convert("in.pt", "expected.pt", transforms=chain)
    for target in ("out.pt", "modular"):
        found = vc.diff("expected.pt", target)
        assert {change.what for change in found.history} <= {"added", "removed"}
        assert (found.model, found.optimizer, found.payload, found.experts, found.other) == ((), (), (), (), ())
    assert [summary.target.name for summary in done.results] == ["out.pt", "modular", "weights.safetensors"]
    assert vc.check("modular", manifest="m.json").sound
    assert done.results[2].losses
    assert json.loads(Path("plan.json").read_text())["parent_expert"] == 2


def test_the_recipe_stands_in_the_history_of_every_result_as_it_was_run():
    vc.run(write(FULL), settings={"noise": "0.001"})
    for target in ("out.pt", "modular", "weights.safetensors"):
        first, *rest = vc.open(target).history
        assert (first.name, first.source) == ("run", "in.pt")
        assert first.options["recipe"] == "recipe.yaml"
        assert first.options["vars"] == {"run": ".", "noise": 0.001}
        assert first.options["chain"][1] == {"mitosis_split": {"noise": 0.001}}
        assert [record.name for record in rest] == ["arc_meta", "mitosis_split"]
    assert "recipe recipe.yaml: 2 steps, 3 targets" in [record.summary for record in vc.inspect("out.pt").history]


def test_the_same_recipe_gives_the_same_bytes(here):
    vc.run(write(FULL))
    before = {name: Path(name).read_bytes() for name in files_below(here)}
    vc.run("recipe.yaml", overwrite=True)
    assert {name: Path(name).read_bytes() for name in files_below(here)} == before


@pytest.mark.parametrize(
    ("given", "value"), [("0.5", 0.5), ("3", 3), ("true", True), ("null", None), ("a: b", "a: b"), ("1e-5", 1e-5)]
)
def test_a_variable_is_set_to_what_yaml_takes_a_text_for(given, value, here):
    write("vars: {x: 1}\nsource: in.pt\nchain: ['arc_meta:visits=visits.json']\ntargets: ['${x}.pt']\n")
    vc.run("recipe.yaml", settings={"x": given})
    (made,) = [name for name in files_below(here) if name.name not in ("in.pt", "visits.json", "recipe.yaml")]
    assert vc.open(made).history[0].options["vars"] == {"x": value}


ODD = ["1.10", "0001", "010", "1:30", "0x10", "yes", "on", "@best", "[1,2", "*.pt", "%x", "'"]


@pytest.mark.parametrize("given", [*ODD, "a #b"])
def test_a_variable_in_a_longer_text_stands_there_as_it_was_written(given, here):
    write("vars: {x: 1}\nsource: in.pt\ntargets: ['out_${x}.pt']\n")
    vc.run("recipe.yaml", settings={"x": given})
    assert (here / f"out_{given}.pt").exists()
    if not set(given) & set("@[*%'#:"):
        write(f"vars: {{x: {given}}}\nsource: in.pt\ntargets: ['own_${{x}}.pt']\n")
        vc.run("recipe.yaml")
        assert (here / f"own_{given}.pt").exists()


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        (
            "{parent: 2, addresses: [44, 47-50], foreign_addresses: allow, noise: 0}",
            "parent=2,addresses=[44,47-50],foreign_addresses=allow,noise=0",
        ),
        ("{parent: 2, addresses: [035], noise: 1e-5}", "parent=2,addresses=[035],noise=1e-5"),
        ("{parent: 2, addresses: '[44,47]', noise: '0', seed: 7}", "parent=2,addresses=[44,47],noise=0,seed=7"),
    ],
)  # fmt: skip
def test_an_option_means_the_same_in_a_mapping_and_in_a_text(mapping, text):
    for name, step in (("a", f"{{mitosis_split: {mapping}}}"), ("b", f"'mitosis_split:{text}'")):
        write(f"source: in.pt\nchain: [{step}]\ntargets: [{name}.pt]\n", f"{name}.yaml")
        vc.run(f"{name}.yaml")
    found = vc.diff("a.pt", "b.pt")
    assert (found.model, found.optimizer, found.payload) == ((), (), ())
    assert vc.open("a.pt").history[1].options == vc.open("b.pt").history[1].options


def test_a_comma_in_a_variable_begins_no_further_option(here):
    (here / "v,parent=0").mkdir()
    shutil.copy("visits.json", "v,parent=0/v.json")
    write("vars: {f: 'v,parent=0'}\nsource: in.pt\nchain: ['arc_meta:visits=${f}/v.json']\ntargets: [a.pt]\n")
    vc.run("recipe.yaml")
    assert vc.open("a.pt").plan.parent == 2


def test_a_variable_may_be_made_of_those_above_it(here):
    write("vars: {run: ., n: 1.10, stem: '${run}/out_${n}', same: '${n}', '_': '$${x}'}\n"
          "source: ${run}/in.pt\ntargets: ['${stem}_${same}_${_}.pt']\n")  # fmt: skip
    vc.run("recipe.yaml")
    assert (here / "out_1.10_1.10_${x}.pt").exists()
    vc.run("recipe.yaml", settings={"n": "7", "stem": "${run}/b${n}"})
    assert (here / "b7_7_${x}.pt").exists()


def test_a_variable_that_is_not_above_is_told():
    for vars_, says in (
        ("{a: 'x${b}', b: 1}", "line 1: vars.a: the variable 'b' must be defined before its use"),
        ("{a: '${a}'}", "line 1: vars.a: the variable 'a' must be defined before its use"),
        ("{a: 'x${nowhere}'}", "line 1: vars.a: there is no variable 'nowhere'"),
    ):
        assert any(says in line for line in refused(f"vars: {vars_}\nsource: in.pt\ntargets: ['${{a}}.pt']\n")), says
    told = refused("vars: {a: 1}\nsource: in.pt\ntargets: ['${a}.pt']\n", settings={"a": "${HOME}/x"})
    assert told == ["  --set.a: there is no variable 'HOME'"]


def test_a_setting_from_python_is_a_text():
    told = refused("vars: {n: 1}\nsource: in.pt\ntargets: ['a${n}.pt']\n", settings={"n": 0.5})
    assert told == ["  --set.n: must be a string, as on the command line"]


def test_a_dollar_sign_is_written_twice_and_the_recipes_folder_is_known(here):
    (here / "sub").mkdir()
    write("source: '${recipe_dir}/../in.pt'\ntargets: ['$${x}.pt', '${recipe_dir}/b.pt']\n", "sub/recipe.yaml")
    vc.run("sub/recipe.yaml")
    assert Path("${x}.pt").exists()
    assert Path("sub/b.pt").exists()


def test_everything_that_is_wrong_is_told_at_once_with_its_line():
    told = refused(
        """\
vars:
  noise: 0
  never: 1
source: {path: in.pt, form: pt}
chain:
  - arc_meta:
      visit: x.json
      parent: two
  - mitosis_splt
  - mitosis_split: {noise: "${nose}", seed: many}
  - [1, 2]
  - mitosis_split:noise=-1
targets:
  - {path: a.pt, to: pth}
  - {to: pt}
losses: maybe
loses: warn
"""
    )
    expected = [
        "line 3: vars.never: is not used",
        "line 4: source.form: unknown entry 'form', did you mean 'from'?",
        "line 7: chain[0].arc_meta.visit: unknown option 'visit', did you mean 'visits'?",
        "line 8: chain[0].arc_meta.parent: option 'parent'",
        "line 9: chain[1]: unknown transform 'mitosis_splt' (did you mean 'mitosis_split'?)",
        "line 10: chain[2].mitosis_split.noise: there is no variable 'nose', did you mean 'noise'?",
        "line 10: chain[2].mitosis_split.seed: option 'seed'",
        "line 11: chain[3]: must be NAME",
        "line 12: chain[4]: option 'noise'",
        "line 14: targets[0].to: unknown format 'pth'",
        "line 15: targets[1].path: is required",
        "line 16: losses: ",
        "line 17: loses: unknown entry 'loses', did you mean 'losses'?",
    ]
    for part in expected:
        assert any(part in line for line in told), (part, told)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be a mapping"),
        ("- a\n- b\n", "must be a mapping"),
        ("source: in.pt\n", "to change a checkpoint in place, use `edit`"),
        ("source: in.pt\ntargets: []\n", "to change a checkpoint in place, use `edit`"),
        ("targets: [a.pt]\n", "source: is required"),
        ("source: in.pt\nsource: in.pt\ntargets: [a.pt]\n", "line 2: source: the key occurs twice"),
        ("source: in.pt\n\ttargets: [a.pt]\n", "line 2"),
        ("source: &a in.pt\ntargets: [*a]\n", "line 2: aliases"),
        ("source: !!python/object/apply:os.system [x]\ntargets: [a.pt]\n", "the tag"),
        ("source: in.pt\ntargets: [a.pt, b.pt]\nmanifest: m.json\n", "give each target its own `manifest`"),
        ("schema: vraxion-ckpt/recipe/9\nsource: in.pt\ntargets: [a.pt]\n", "line 1: schema"),
        ("source: in.pt\nchain: mitosis_split\ntargets: [a.pt]\n", "line 2: chain"),
        ("source: in.pt\nchain: [{arc_meta: 3}]\ntargets: [a.pt]\n", "must be a mapping of options"),
        ("vars: [a]\nsource: in.pt\ntargets: [a.pt]\n", "line 1: vars"),
        ("source: '${x}'\ntargets: [a.pt]\n", "there is no variable 'x'"),
        ("? [a, b]\n: c\nsource: in.pt\ntargets: [a.pt]\n", "a key must be plain text"),
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
        ("vars: {n: }\nsource: in.pt\ntargets: ['a${n}.pt']\n", "has no value: pass --set n=…"),
        ("vars: {n: .nan}\nsource: in.pt\ntargets: ['a${n}.pt']\n", "line 1: vars.n: .nan is not a finite number"),
        ("vars: {n: [1]}\nsource: in.pt\ntargets: ['a${n}.pt']\n", "line 1: vars.n: must be a string"),
        (
            "vars: {recipe_dir: x}\nsource: in.pt\ntargets: ['a${recipe_dir}.pt']\n",
            "is reserved for",
        ),
        ("source: in.pt\ntargets: ['a${ s }.pt']\n", "'${ s }' is not a variable; write $${"),
        ("source: in.pt\ntargets: ['a${s.pt']\n", "is not a variable"),
        ("vars: {t: path}\nsource: in.pt\ntargets: [{'${t}': a.pt}]\n", "a key must not contain a variable"),
        ("source: in.pt\nchain: [{mitosis_split: {parent: yes, noise: true}}]\ntargets: [a.pt]\n", "option 'noise'"),
        ("source: in.pt\noverwrite: !!bool maybe\ntargets: [a.pt]\n", "the tag"),
        ("source: 7\ntargets: [3]\n", "line 2: targets[0]: must be a string, or a mapping"),
        ('source: in.pt\ntargets: [{path: a.pt, manifest: "m\\0"}]\n', "line 2: targets[0].manifest: contains NUL"),
        (
            'source: in.pt\nchain: [{arc_meta: {output: "\\ud800"}}]\ntargets: [a.pt]\n',
            "chain[0].arc_meta.output: contains",
        ),
        ('vars: {m: "\\0"}\nsource: in.pt\ntargets: ["${m}.pt"]\n', "line 1: vars.m: contains NUL"),
        ("source: in.pt\ntargets: [{path: a.pt, manifest: ''}]\n", "'' is not a valid path"),
        ("source: in.pt\ntargets: [a.pt, ./a.pt]\n", "is the path of two outputs"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_reason(text, says, run_cli):
    told = run_cli("run", write(text))
    assert told[0] == 2
    assert says in told[2]
    assert "Traceback" not in told[2]
    assert max(map(len, told[2].splitlines())) < 300


def test_a_wrong_call_is_refused(here, run_cli):
    write(FULL)
    (here / "binary.yaml").write_bytes(b"\xff\xfe")
    for arguments, says in (
        (["nowhere.yaml"], "no such file"),
        (["binary.yaml"], "not UTF-8"),
        (["recipe.yaml", "--set", "noise"], "is not NAME=VALUE"),
        (["recipe.yaml", "--set", "noise=1", "--set", "noise=2"], "--set noise is given twice"),
        (["recipe.yaml", "--set", "nois=1"], "--set.nois: is not a variable of the recipe, did you mean 'noise'?"),
        ([], "Missing argument 'RECIPE'"),
    ):
        code, _, complained = run_cli("run", *arguments)
        assert code == 2
        assert says in complained


def test_one_fault_is_told_once():
    for text in (
        "source: 7\ntargets: [a.pt]\n",
        "source: in.pt\ntargets: [{path: a.pt, form: x}]\n",
        "vars: {x: [1]}\nsource: in.pt\ntargets: ['${x}.pt']\n",
        "vars: {x: .inf}\nsource: in.pt\ntargets: ['a${x}.pt']\n",
        "source: in.pt\nchain: [{mitosis_split: {noise: '${nose}'}}]\ntargets: [a.pt]\n",
        "source: in.pt\nchain: ['mitosis_split:noise=${nose}']\ntargets: [a.pt]\n",
    ):
        assert len(refused(text)) == 1, text


# --- several targets ---


def test_nothing_is_written_if_one_target_is_refused(here):
    for second in (
        "{path: w.safetensors, to: 'safetensors:weights_only=true'}",
        "in.pt",
        "a.pt",
        "a.pt/",
        "nowhere/b.pt",
        "{path: b.pt, manifest: a.pt}",
        "{path: b.pt, manifest: visits.json}",
        "visits.json",
        "recipe.yaml",
        "{path: b.pt, manifest: recipe.yaml}",
        "{path: b/, manifest: a.pt}",
        "{path: b.pt, manifest: c/m.json}, c/",
        "c.pt, {path: b.pt, manifest: c.pt}",
    ):
        write(f"source: in.pt\nchain: ['arc_meta:visits=visits.json']\ntargets: [a.pt, {second}]\n")
        before = {name: name.read_bytes() for name in files_below(here)}
        for overwrite in (False, True):
            with pytest.raises(CkptError):
                vc.run("recipe.yaml", overwrite=overwrite)
            assert {name: name.read_bytes() for name in files_below(here)} == before, second
    write("source: in.pt\ntargets: [a.pt, {path: w.safetensors, to: 'safetensors:weights_only=true'}]\n")
    with pytest.raises(LossError, match="the optimizer's state"):
        vc.run("recipe.yaml")


def test_a_failure_while_the_second_target_is_written_leaves_nothing_of_the_first(here, monkeypatch):

    def full(*_):
        raise StorageError("No space left on device", path="b.safetensors")

    monkeypatch.setattr("vraxion_ckpt_adapters.safetensors.adapter.save_safetensors", full)
    write("source: in.pt\ntargets: [a.pt, b.safetensors]\n")
    before = files_below(here)
    with pytest.raises(StorageError, match="No space left"):
        vc.run("recipe.yaml")
    assert files_below(here) == before


def test_a_target_that_appears_meanwhile_is_told_with_what_was_written(monkeypatch):
    from vraxion_ckpt.conversion import convert

    original = convert.publish

    def also(*args, **how):
        original(*args, **how)
        Path("b.pt").write_text("somebody else's")

    monkeypatch.setattr(convert, "publish", also)
    write("source: in.pt\ntargets: [a.pt, b.pt]\n")
    with pytest.raises(UsageError, match=r"was created by another process; .*a\.pt was written, .*b\.pt was not"):
        vc.run("recipe.yaml")
    assert Path("b.pt").read_text() == "somebody else's"
    assert vc.check("a.pt").sound


@pytest.mark.parametrize("failing", range(1, 6))
def test_a_full_disk_between_two_renames_is_told_with_all_that_was_written(failing, here, monkeypatch):
    from vraxion_ckpt.commit import system_calls

    original, renamed = system_calls.rename_new, []

    def rename_new(source, target):
        if len(renamed) == failing - 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        original(source, target)
        renamed.append(str(target))

    monkeypatch.setattr(system_calls, "rename_new", rename_new)
    targets = "[{path: a.pt, manifest: a.json}, {path: b.pt, manifest: b.json}]"
    write(f"source: in.pt\nchain: ['arc_meta:visits=visits.json,output=p.json']\ntargets: {targets}\n")
    before = set(files_below(here))
    with pytest.raises(StorageError, match="No space left") as caught:
        vc.run("recipe.yaml")
    assert {str(here / name) for name in set(files_below(here)) - before} == set(renamed)
    for target in renamed:
        assert f"{target} was written" in str(caught.value)


def test_a_signal_between_two_targets_comes_too_late(here):
    """The first is in place: the others follow, and the exit code says that all is there."""
    script = (
        "import os, signal, sys; from vraxion_ckpt.conversion import convert; from vraxion_ckpt.cli import main\n"
        "original = convert.publish\n"
        "def also(*args, **how):\n    original(*args, **how); os.kill(os.getpid(), signal.SIGTERM)\n"
        "convert.publish = also\nmain(sys.argv[1:])"
    )
    write("source: in.pt\ntargets: [a.pt, b/]\n")
    command = [forked.python(), "-c", script, "run", "recipe.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == 0, done.stderr
    assert "the signal came too late: a.pt, b/ was written" in done.stderr
    assert vc.check("a.pt").sound
    assert vc.check("b").sound
    assert sorted(path.name for path in here.iterdir()) == ["a.pt", "b", "in.pt", "recipe.yaml", "visits.json"]


def test_a_dry_run_and_json_tell_the_same_and_write_nothing(here, run_cli):
    write(FULL)
    before = files_below(here)
    code, said, _ = run_cli("run", "recipe.yaml", "--dry-run", "--json")
    assert (code, files_below(here)) == (0, before)
    facts = json.loads(said)
    jsonschema.validate(facts, json.loads(run_cli("schema", "run")[1]))
    assert [result["target_format"] for result in facts["results"]] == ["pt", "modular", "safetensors"]
    code, said, _ = run_cli("run", "recipe.yaml")
    assert code == 0
    assert said.count("3 → 4") == 3
    assert max(map(len, said.splitlines())) <= 80
    code, _, complained = run_cli("run", "recipe.yaml")
    assert code == 2
    assert "--overwrite" in complained


# --- the schema, the example ---


def test_the_schema_accepts_good_recipes_and_refuses_wrong_ones(run_cli):
    code, said, _ = run_cli("run", "--print-schema")
    assert code == 0
    schema = json.loads(said)
    assert schema == json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for good in (FULL, (EXAMPLE / "refine.yaml").read_text()):
        validator.validate(yaml.safe_load(good))
    for wrong in (
        "source: a.pt",
        "source: a.pt\ntargets: []",
        "source: a.pt\ntargets: [b.pt]\nloses: warn",
        "source: a.pt\ntargets: [b.pt]\nchain: [{arc_meta: {visit: x}}]",
        "source: a.pt\ntargets: [b.pt]\nchain: [{nonsense: {}}]",
    ):
        assert list(validator.iter_errors(yaml.safe_load(wrong))), wrong


def test_the_example_makes_the_directory_of_the_runbook(tmp_path, monkeypatch, run_cli):
    shutil.copytree(EXAMPLE, tmp_path / "refinement")
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "refinement/refine.yaml", "--set", "run=refinement/run_0001", "--set", "noise=0"]
    assert run_cli(*arguments)[0] == 0
    run = tmp_path / "refinement/run_0001"
    names = ["ckpt_post_split.pt", "ckpt_pre_split.pt", "manifest.json", "mitosis_meta.json", "visits.json"]
    assert sorted(path.name for path in run.iterdir()) == names
    chain = ["single_to_experts", ("arc_meta", {"visits": run / "visits.json"}), "mitosis_split:noise=0"]
    vc.convert(run / "ckpt_pre_split.pt", tmp_path / "expected.pt", transforms=chain)
    found = vc.diff(tmp_path / "expected.pt", run / "ckpt_post_split.pt")
    assert (found.model, found.optimizer, found.payload, found.lifecycle) == ((), (), (), ())
    code, _, complained = run_cli(*arguments)
    assert code == 2
    assert "ckpt_post_split.pt" in complained
    assert run_cli(*arguments, "--overwrite")[0] == 0


# --- keys in the wrong place, and options that a recipe has keys for ---


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "optimizer: drop\nsource: in.pt\ntargets: [a.pt]\n",
            "line 1: optimizer: is not known here; it is a key of source",
        ),
        (
            "source: in.pt\ntargets: [a.pt]\noverwrite: true\n",
            "line 3: overwrite: is not known here; it is a key of targets",
        ),
        (
            "source: {path: in.pt, companions: keep}\ntargets: [a.pt]\n",
            "line 1: source.companions: is not known here; it is a key of the top level",
        ),
    ],
)
def test_a_key_in_the_wrong_place_is_told_where_it_belongs(text, line):
    assert refused(text) == [f"  {line}"]


def test_a_refused_recipe_names_the_keys_that_stand_for_options(run_cli):
    text = 'source: in.pt\ntargets: [{path: a.safetensors, to: "safetensors:weights_only=true"}]\n'
    with pytest.raises(LossError) as refused:
        vc.run(write(text))
    assert refused.value.__notes__ == ["in a recipe, --losses is the key losses"]
    code, _, said = run_cli("run", "recipe.yaml")
    assert code == LossError.exit_code
    assert "in a recipe, --losses is the key losses" in said


def test_every_key_for_an_option_is_one_of_a_recipe():
    schema = json_schema()
    entries = {"source": schema["$defs"]["Source"], "targets": schema["$defs"]["Output"]}
    for key in RECIPE_KEYS.values():
        entry, _, inner = key.rpartition(".")
        assert inner in entries.get(entry, schema)["properties"], key
