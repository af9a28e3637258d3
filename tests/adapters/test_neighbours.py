"""Hugging Face folders as one checkpoint: what is beside the weights is carried along, or said to be missing."""

import inspect
import json
import os
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import files_below

import vraxion_ckpt as vc
from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.plugin_api import (
    Checkpoint,
    CkptWarning,
    Effect,
    InconsistentError,
    TensorRef,
    Transform,
    TransformError,
    UsageError,
)

SHARDS = "safetensors:max_shard_size=400B"
WHOLE = "safetensors:max_shard_size=1GB"
INDEX = "model.safetensors.index.json"
DESCRIPTION = {
    "config.json": '{"hidden_size": 4}',
    "generation_config.json": "{}",
    "tokenizer.json": '{"é": [1, 2]}\n',
    "tokenizer_config.json": "{}",
    "README.md": "# A model\r\n",
    "additional_chat_templates/tool.jinja": "{{ x }}",
    "weights_of_nothing.txt": "",
}
TRAINER = {
    "optimizer.pt": "the optimizer",
    "scheduler.pt": "training state",
    "rng_state_0.pth": "training state",
    "trainer_state.json": "training state",
    "training_args.bin": "training state",
}


def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"layers.{i}.weight": torch.randn(8, 8, generator=generator) for i in range(4)}


def hf_folder(folder: Path, *more: str) -> Path:
    """Write a folder with one file of weights, its description, and further files."""
    folder.mkdir()
    save_file(model(), folder / "model.safetensors", metadata={"format": "pt"})
    for name, text in {**DESCRIPTION, **dict.fromkeys(more, "something")}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def beside(folder: Path) -> dict[str, bytes]:
    """Return the files other than weights and index, by relative path."""
    names = [name for name in files_below(folder) if not name.name.startswith("model")]
    return {str(name): (folder / name).read_bytes() for name in names}


class Scale(Transform):
    """Change the values of the model, or its structure too."""

    name: ClassVar[str] = "scale"
    dtype: str = "float32"

    def effect(self) -> Effect:
        return Effect.changed()

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        dtype = getattr(torch, self.dtype)
        for name, tensor in checkpoint.core.references().items():
            assert isinstance(tensor, TensorRef)
            checkpoint.core[name] = tensor.mapped(lambda t: (t * 2).to(dtype), dtype=self.dtype)
        return checkpoint


@pytest.mark.parametrize("to", [SHARDS, WHOLE])
def test_a_folder_is_converted_as_a_unit(to, tmp_path):
    source = hf_folder(tmp_path / "source")
    done = vc.convert(source, tmp_path / "there", to=to)
    assert sorted(done.carried) == sorted(DESCRIPTION)
    vc.convert(tmp_path / "there", tmp_path / "back", to=WHOLE)
    for folder in ("there", "back"):
        assert beside(tmp_path / folder) == beside(source)
        assert vc.diff(source, tmp_path / folder).identical
    names = {name.name for name in files_below(tmp_path / "there") if name.name.startswith("model")}
    shards = {f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)}
    assert names == ({*shards, INDEX} if to == SHARDS else {"model.safetensors"})
    for name in names - {INDEX}:
        with safe_open(tmp_path / "there" / name, "pt") as file:
            assert file.metadata()["format"] == "pt"
    assert load_file(tmp_path / "back/model.safetensors").keys() == model().keys()


def test_an_index_states_the_size_and_the_file_of_each_tensor(tmp_path):
    vc.convert(hf_folder(tmp_path / "source"), tmp_path / "there", to=SHARDS)
    index = json.loads((tmp_path / "there" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * 8 * 8 * 4
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "there" / file)[name], model()[name])


def test_a_file_has_no_place_for_neighbours_and_the_way_back_names_them(tmp_path):
    source = hf_folder(tmp_path / "source")
    with pytest.raises(vc.CkptError, match=r"files beside the weights \(README.md, .*the target is a single file"):
        vc.convert(source, tmp_path / "a.pt")
    vc.convert(source, tmp_path / "a.pt", losses="ignore")
    assert torch.load(tmp_path / "a.pt").keys() == model().keys()
    found = vc.diff(source, tmp_path / "a.pt")
    assert found.identical
    assert "has files beside the weights" in found.notes[-1]
    with pytest.warns(CkptWarning, match="that an earlier conversion has left behind: README.md, .*conf"):
        vc.convert(tmp_path / "a.pt", tmp_path / "back", to=WHOLE)
    assert beside(tmp_path / "back") == {}
    for name in DESCRIPTION:
        (tmp_path / "back" / name).parent.mkdir(exist_ok=True)
        shutil.copy(source / name, tmp_path / "back" / name)
    assert vc.diff(source, tmp_path / "back").identical
    vc.convert(tmp_path / "back", tmp_path / "again", to=SHARDS)


@pytest.mark.parametrize("other", ["scheduler.pt", "pytorch_model.bin", "global_step5/zero.pt"])
def test_files_that_are_not_read_are_named(other, tmp_path):
    source = hf_folder(tmp_path / "source", other)
    facts = vc.inspect(source)
    assert facts.neighbours[other].holds
    assert not facts.neighbours["config.json"].holds
    assert "files beside the weights" in str(facts.losses["pt"][0])
    with pytest.warns(CkptWarning, match=f"copied as they are, and not read: {other}"):
        vc.convert(source, tmp_path / "there", to=SHARDS)
    assert beside(tmp_path / "there") == beside(source)


def test_a_trainers_folder_is_named_and_kept_or_refused(tmp_path, run_cli):
    source = hf_folder(tmp_path / "source", *TRAINER)
    assert {name: vc.inspect(source).neighbours[name].holds for name in TRAINER} == TRAINER
    code, said, _ = run_cli("inspect", source)
    assert (code, "not read optimizer.pt (the optimizer)" in " ".join(said.split())) == (0, True)
    with pytest.raises(TransformError, match=r"any more: optimizer.pt, rng_state_0.pth, scheduler.pt, tr"):
        vc.convert(source, tmp_path / "there", to=SHARDS, transforms=[Scale()])
    with pytest.raises(TransformError):
        vc.edit(source, transforms=[Scale()])
    vc.edit(source, transforms=[Scale()], neighbours="ignore", dry_run=True)
    assert beside(source).keys() == {*DESCRIPTION, *TRAINER}
    with pytest.warns(CkptWarning, match="not read: training_args.bin"):
        done = vc.convert(source, tmp_path / "there", to=SHARDS, transforms=[Scale()], neighbours="ignore")
    assert {*done.left_out} == TRAINER.keys() - {"training_args.bin"}
    assert beside(tmp_path / "there").keys() == {*DESCRIPTION, "training_args.bin"}
    edited = vc.edit(source, transforms=[Scale()], neighbours="ignore")
    assert edited.left_out == edited.removed == done.left_out
    assert vc.diff(source, tmp_path / "there").tensors_identical == 4
    assert beside(source) == beside(tmp_path / "there")


def test_a_configuration_goes_stale_with_the_structure_alone(tmp_path):
    source = hf_folder(tmp_path / "source", "model.fp16.safetensors")
    with pytest.raises(TransformError, match=r"more: model.fp16.safetensors"):
        vc.convert(source, tmp_path / "a", to=SHARDS, transforms=[Scale()])
    (source / "model.fp16.safetensors").unlink()
    vc.convert(source, tmp_path / "a", to=SHARDS, transforms=[Scale()])
    assert beside(tmp_path / "a") == beside(source)
    with pytest.raises(TransformError, match=r"more: config.json"):
        vc.convert(source, tmp_path / "b", to=SHARDS, transforms=[Scale(dtype="bfloat16")])
    done = vc.convert(source, tmp_path / "b", to=SHARDS, transforms=[Scale(dtype="bfloat16")], neighbours="ignore")
    assert done.left_out == ("config.json",)
    with pytest.raises(vc.CkptError):  # what goes into a file has no neighbours, so none is stale
        vc.convert(source, tmp_path / "b.pt", transforms=[Scale(dtype="bfloat16")])
    vc.convert(source, tmp_path / "b.pt", transforms=[Scale(dtype="bfloat16")], losses="ignore")


@pytest.mark.parametrize("to", [SHARDS, WHOLE])
@pytest.mark.parametrize("keep_old", [False, True])
def test_an_edit_keeps_the_layout_and_everything_beside_the_weights(to, keep_old, tmp_path):
    vc.convert(hf_folder(tmp_path / "source"), tmp_path / "target", to=to)
    target = tmp_path / "target"
    (target / ".git").mkdir()
    (target / ".git/HEAD").write_text("main")
    (target / "checkpoint-5").mkdir()
    (target / "checkpoint-5/model.safetensors").write_text("another")
    before = files_below(target)
    vc.edit(target, transforms=[Scale()], keep_old=keep_old)
    assert files_below(target) == before
    assert beside(target).items() >= beside(tmp_path / "source").items()
    assert (target / ".git/HEAD").read_text() == "main"
    assert torch.equal(vc.open(target).state_dict()["layers.1.weight"], 2 * model()["layers.1.weight"])
    if keep_old:
        assert vc.diff(tmp_path / "source", tmp_path / "target.old").identical


def content(folder):
    weights = load_file(folder / "model.safetensors")
    return {**beside(folder), **{name: tensor.tolist() for name, tensor in weights.items()}}


def failing(function, calls, at):
    """Return a system call that fails if it is call number `at` of all."""

    def call(*args, **named):
        if next(calls) == at:
            raise OSError(28, "No space left on device", str(args[0]))
        return function(*args, **named)

    return call


def test_a_failing_edit_leaves_the_old_or_the_new_folder_with_all_its_neighbours(tmp_path, monkeypatch):
    source = hf_folder(tmp_path / "source", "optimizer.pt")
    new = shutil.copytree(source, tmp_path / "new")
    vc.edit(new, transforms=[Scale()], neighbours="ignore")
    states = [content(each) for each in (source, new)]
    functions = {name: value for name, value in vars(system_calls).items() if inspect.isfunction(value)}
    for at in range(1, 200):
        target = shutil.copytree(source, tmp_path / f"target{at}")
        calls = count(1)
        with monkeypatch.context() as patched:
            for name, function in functions.items():
                patched.setattr(system_calls, name, failing(function, calls, at))
            with suppress(vc.CkptError):
                vc.edit(target, transforms=[Scale()], neighbours="ignore")
        assert content(target) in states
        shutil.rmtree(target)
        if next(calls) <= at:
            break
    assert 5 < at < 199


def test_what_is_apart_is_not_copied_and_named(tmp_path):
    source = hf_folder(tmp_path / "source")
    for name in ("checkpoint-5/model.safetensors", ".cache/x", "onnx/model.onnx"):
        (source / name).parent.mkdir()
        (source / name).write_text("x")
    with pytest.warns(CkptWarning, match="they are not part of the checkpoint: checkpoint-5, onnx$"):
        vc.convert(source, tmp_path / "there", to=SHARDS)
    assert beside(tmp_path / "there").keys() == DESCRIPTION.keys()


def test_nothing_beside_the_weights_of_a_target_is_deleted(tmp_path):
    source = hf_folder(tmp_path / "source")
    vc.convert(source, tmp_path / "target", to=SHARDS)
    vc.convert(source, tmp_path / "target", to=WHOLE, overwrite=True)
    assert beside(tmp_path / "target") == beside(source)
    (tmp_path / "target/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"\(notes.txt\) and would be deleted"):
        vc.convert(source, tmp_path / "target", to=SHARDS, overwrite=True)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    source = hf_folder(tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "LICENSE").symlink_to("../secret")
    with pytest.raises(InconsistentError, match="leads out of the checkpoint"):
        vc.convert(source, tmp_path / "there", to=SHARDS)
    (source / "LICENSE").unlink()
    (source / "LICENSE").symlink_to("README.md")
    vc.convert(source, tmp_path / "there", to=SHARDS)
    assert (tmp_path / "there/LICENSE").read_text() == (source / "README.md").read_text()
    os.mkfifo(source / "pipe")
    assert "pipe" not in vc.inspect(source).neighbours


def test_a_manifest_covers_what_is_beside_the_weights(tmp_path):
    vc.convert(hf_folder(tmp_path / "source"), tmp_path / "there", to=SHARDS, manifest=tmp_path / "m.json")
    usual = vc.check(tmp_path / "there", manifest=tmp_path / "m.json").findings
    (tmp_path / "there/tokenizer.json").write_text("{}")
    found = vc.check(tmp_path / "there", manifest=tmp_path / "m.json").findings
    (finding,) = [each for each in found if each not in usual]
    assert "tokenizer.json" in str(finding)


# --- compared ---


def test_folders_differ_in_a_file_beside_the_weights(tmp_path):
    one, other = hf_folder(tmp_path / "one"), hf_folder(tmp_path / "other", "vocab.txt")
    (other / "config.json").write_text('{"hidden_size": 5}')
    (other / "README.md").unlink()
    changes = {(change.what, change.before or change.after) for change in vc.diff(one, other).other}
    assert changes == {("changed", "config.json"), ("removed", "README.md"), ("added", "vocab.txt")}


def test_the_order_in_sorted_files_is_not_a_difference(tmp_path):
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(3, generator=generator).to(dtype) for name, dtype in
               (("z", torch.float16), ("a", torch.float16), ("m", torch.float64))}  # fmt: skip
    tensors["tied"] = tensors["z"]
    torch.save({"model": tensors}, tmp_path / "a.pt")
    save_file({name: tensors[name] for name in "zam"}, tmp_path / "a.safetensors")
    found = vc.diff(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert found.identical
    assert [note.partition(":")[0] for note in found.notes][1:] == ["the order of the tensors is not compared"]
    assert "cannot state that z and tied share memory" in found.notes[0]
    tensors["z"][0] = 0
    torch.save({"model": tensors}, tmp_path / "b.pt")
    assert not vc.diff(tmp_path / "a.safetensors", tmp_path / "b.pt").identical
    tensors["tied"] = tensors["z"].clone()
    torch.save({"model": tensors}, tmp_path / "c.pt")  # not tied, so the file lacks it
    found = vc.diff(tmp_path / "c.pt", tmp_path / "a.safetensors")
    assert [change.before for change in found.model if change.what == "removed"] == ["tied"]
