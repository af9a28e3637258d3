"""safetensors files and shards: round trips, files of other software, and damaged or hostile files."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import DATA, DIRECTORIES, MONOLITHS, assert_same, bits, files_below, load
from work import bounded

import vraxion_ckpt as vc
from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.commit.staging import Staged
from vraxion_ckpt.errors import (
    CkptError,
    CorruptError,
    InconsistentError,
    LimitError,
    LossError,
    PluginError,
    StorageError,
    UnknownFormatError,
    UnsupportedError,
    UsageError,
)
from vraxion_ckpt.formats import safetensors_file, torch_reader
from vraxion_ckpt.support import json_files

SHARDS = "safetensors:max_shard_size=4KB"
WEIGHTS = "safetensors:weights_only=true"
INDEX = "model.safetensors.index.json"
SPLIT = "mitosis_split:parent=0,addresses=[0,3],noise=0"
EVERY = [*MONOLITHS, *DIRECTORIES]
SOURCE = DATA / "wallclock_experts3.pt"


pytestmark = pytest.mark.usefixtures("no_reader_waits_for_ever")


def model_of(source: Path) -> dict[str, torch.Tensor]:
    """Return a state dict read with torch alone. For a modular directory, it includes all shards."""
    if source.is_file():
        payload = load(source)
        return dict(payload.get("model", payload))
    model = dict(load(source / "system/router.state")["model"])
    for shard in sorted((source / "experts").glob("expert_*.pt")):
        number = int(shard.stem.removeprefix("expert_"))
        model |= {f"head.experts.{number}.{leaf}": tensor for leaf, tensor in load(shard).items()}
    return model


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Load every shard that an index names, without using the package."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    found: dict[str, torch.Tensor] = {}
    for file in sorted(set(weight_map.values())):
        held = load_file(folder / file)
        assert set(held) == {name for name, place in weight_map.items() if place == file}
        found |= held
    return found


def assert_same_checkpoint(ours: Path, theirs: Path, made_from: str) -> None:
    """Compare ``.pt`` files, or all files of modular directories, as read by torch and json."""
    if theirs.is_file():
        return assert_same(load(ours), load(theirs))
    assert files_below(ours) == files_below(theirs)
    for file in files_below(theirs):
        if file.suffix != ".json":
            assert_same(load(ours / file), load(theirs / file), str(file))
            continue
        mine, wanted = json.loads((ours / file).read_text()), json.loads((theirs / file).read_text())
        if "source_checkpoint" in wanted:
            # This is the name of the source, which differs here.
            assert mine["source_checkpoint"] == made_from
            wanted["source_checkpoint"] = made_from
        assert json.dumps(mine) == json.dumps(wanted)
    return None


# --- there and back ---


@pytest.mark.parametrize("to", ["safetensors", SHARDS])
@pytest.mark.parametrize("source", EVERY, ids=lambda path: path.name)
def test_every_real_checkpoint_comes_back_to_its_own_format_bit_by_bit(source, to, tmp_path):
    vc.convert(source, tmp_path / "there", to=to)
    vc.convert(tmp_path / "there", tmp_path / "back", to="modular" if source.is_dir() else "pt")
    assert_same_checkpoint(tmp_path / "back", source, "there")


@pytest.mark.parametrize("source", EVERY, ids=lambda path: path.name)
def test_the_library_itself_finds_every_tensor_of_the_model_under_its_own_name(source, tmp_path):
    vc.convert(source, tmp_path / "one.safetensors")
    vc.convert(source, tmp_path / "many", to=SHARDS)
    model = model_of(source)
    for held in (load_file(tmp_path / "one.safetensors"), load_folder(tmp_path / "many")):
        ours = {name: tensor for name, tensor in held.items() if not name.startswith("vraxion_ckpt/")}
        assert_same({name: ours[name] for name in model}, model)
        assert ours.keys() == model.keys()
    order = list(vc.open(source).state_dict())
    for path in ("one.safetensors", "many"):
        found = vc.open(tmp_path / path).state_dict()
        assert list(found) == order
        assert_same({name: found[name] for name in model}, model)


def test_shards_keep_to_their_size_and_training_state_has_shards_of_its_own(tmp_path):
    vc.convert(SOURCE, tmp_path / "many", to=SHARDS)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert files_below(tmp_path / "many") == sorted(map(Path, [*files, INDEX]))
    total = 0
    for file in files:
        held = load_file(tmp_path / "many" / file)
        size = sum(tensor.numel() * tensor.itemsize for tensor in held.values())
        assert size <= 4000 or len(held) == 1
        assert len({name.startswith("vraxion_ckpt/") for name in held}) == 1
        total += size
    assert index["metadata"]["total_size"] == total
    assert len(files) > total / 4000


def test_what_no_other_reader_can_use_is_put_together(tmp_path):
    model = {str(i): torch.ones(3, dtype=torch.complex128 if i % 2 else torch.float32) for i in range(20)}
    torch.save(model, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "many", to="safetensors:max_shard_size=1MB")
    assert len(files_below(tmp_path / "many")) == 3
    assert list(vc.open(tmp_path / "many").state_dict()) == list(model)


def test_every_tensor_lies_where_any_reader_may_map_it(tmp_path):
    for more in range(3):  # headers of other lengths
        model = {
            f"{size} of {dtype}": torch.ones(size, dtype=getattr(torch, dtype))
            for size in (1, 3)
            for dtype in safetensors_file.NATIVE_DTYPE_NAMES
        }
        model["x" * more] = torch.ones(1)
        torch.save(model, tmp_path / f"{more}.pt")
        vc.convert(tmp_path / f"{more}.pt", tmp_path / f"{more}.safetensors")
        content = (tmp_path / f"{more}.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        for entry in (header[name] for name in model if name):
            start, stop = entry["data_offsets"]
            assert (8 + length + start) % ((stop - start) // entry["shape"][0]) == 0


def without_names_of_sources(payload: Any) -> Any:
    """The history names the file that each step read. Nothing else may depend on the file name."""
    for record in payload["vraxion_ckpt"]["history"]:
        del record["source"]
    return payload


@pytest.mark.parametrize("to", ["safetensors", SHARDS])
@pytest.mark.parametrize(
    ("source", "chain"),
    [
        ("wallclock_single.pt", ["single_to_experts", "mitosis_split:parent=0,addresses=[1,5],noise=0"]),
        ("named_experts3.pt", [SPLIT]),
        ("modular_gc", ["mitosis_split:parent=2,addresses=[2,5],noise=0"]),
    ],
)
def test_a_split_on_the_way_into_and_out_of_safetensors_is_the_split_of_the_original(source, chain, to, tmp_path):
    vc.convert(DATA / source, tmp_path / "direct.pt", transforms=chain)
    direct = without_names_of_sources(load(tmp_path / "direct.pt"))
    assert [record["name"] for record in direct["vraxion_ckpt"]["history"]] == [t.split(":")[0] for t in chain]

    vc.convert(DATA / source, tmp_path / "grown", to=to, transforms=chain)
    assert [record.name for record in vc.open(tmp_path / "grown").history] == [t.split(":")[0] for t in chain]
    vc.convert(tmp_path / "grown", tmp_path / "in.pt")
    vc.convert(DATA / source, tmp_path / "plain", to=to)
    vc.convert(tmp_path / "plain", tmp_path / "out.pt", transforms=chain)
    for path in ("in.pt", "out.pt"):
        assert_same(without_names_of_sources(load(tmp_path / path)), direct)


def test_a_planned_split_and_the_rows_of_experts_survive(tmp_path):
    visits = ("arc_meta", {"visits": DATA / "expected/modular_experts3.visits.json"})
    vc.convert(DATA / "modular_experts3", tmp_path / "planned.safetensors", transforms=[visits])
    vc.convert(DATA / "modular_experts3", tmp_path / "planned.pt", transforms=[visits])
    ours, theirs = vc.open(tmp_path / "planned.safetensors"), vc.open(tmp_path / "planned.pt")
    assert ours.plan == theirs.plan is not None
    assert ours.lifecycle == theirs.lifecycle
    assert ours.lifecycle != {i: vc.Lifecycle.fresh(ours.step) for i in range(3)}


@pytest.mark.parametrize("to", ["safetensors", SHARDS])
def test_the_same_checkpoint_gives_the_same_bytes_and_its_source_stays_as_it_is(to, tmp_path):
    before = SOURCE.read_bytes()
    for name in ("one", "two"):
        vc.convert(SOURCE, tmp_path / name, to=to)
    one, two = (
        {file: (tmp_path / name / file).read_bytes() for file in files_below(tmp_path / name) or [Path()]}
        for name in ("one", "two")
    )
    assert one == two
    assert SOURCE.read_bytes() == before
    vc.convert(tmp_path / "one", tmp_path / "copy", to=to)  # and so does a copy of it
    assert {file: (tmp_path / "copy" / file).read_bytes() for file in one} == one


# --- files of others ---

EXPERTS = 12


def foreign_model() -> dict[str, torch.Tensor]:
    """Return a state dict whose order safetensors changes: it sorts by dtype, then by name."""
    random_bits = torch.Generator().manual_seed(3)
    model = OrderedDict(embed=torch.randn(5, 4, generator=random_bits).bfloat16())
    model["router_map"] = torch.arange(24) % EXPERTS
    for i in range(EXPERTS):
        model[f"head.experts.{i}.weight"] = torch.randn(3, 4, generator=random_bits)
        model[f"head.experts.{i}.scale"] = torch.full((3,), float(i)).half()
        model[f"head.experts.{i}.steps"] = torch.tensor([i], dtype=torch.int64)
    model["theta"] = torch.randn(2, dtype=torch.float64, generator=random_bits)
    return model


def hf_folder(folder: Path, prefix: str = "model", **metadata: Any) -> Path:
    """Write three shards and an index as Hugging Face's tools do, with their usual other files."""
    folder.mkdir()
    model = foreign_model()
    names, weight_map = sorted(model), {}
    for number, part in enumerate((names[:10], names[10:20], names[20:]), 1):
        file = f"{prefix}-{number:05d}-of-00003.safetensors"
        save_file({name: model[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.itemsize for tensor in model.values())
    index = {"metadata": {"total_size": size, **metadata}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{prefix}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text('{"architectures": ["X"]}')
    return folder


def assert_foreign(path: Path) -> None:
    """Compare the checkpoint with the state dict it was made from. The head must be contiguous, sorted by id."""
    model, found = foreign_model(), vc.open(path)
    assert found.num_experts == EXPERTS
    assert list(found.head.experts) == list(range(EXPERTS))
    state = found.state_dict()
    assert state.keys() == model.keys()
    assert_same({name: state[name] for name in model}, dict(model))
    places = [place for place, name in enumerate(state) if name.startswith("head.")]
    assert places == list(range(places[0], places[0] + len(places)))


def test_a_file_that_the_library_wrote_is_read_as_a_bare_state_dict(tmp_path):
    save_file(foreign_model(), tmp_path / "theirs.safetensors", metadata={"format": "pt", "author": "someone"})
    held = list(safetensors_file.check_safetensors(tmp_path / "theirs.safetensors").tensors)
    assert [name.split(".")[2] for name in held if "weight" in name][:4] == ["0", "1", "10", "11"], "the fixture"
    assert held.index("head.experts.0.weight") > held.index("head.experts.11.steps"), "the fixture"
    assert_foreign(tmp_path / "theirs.safetensors")

    vc.convert(tmp_path / "theirs.safetensors", tmp_path / "bare.pt")
    bare = load(tmp_path / "bare.pt")
    assert type(bare) is OrderedDict
    assert_same({name: bare[name] for name in foreign_model()}, dict(foreign_model()))
    assert bare.keys() == foreign_model().keys()


def test_a_file_of_others_is_split_as_any_state_dict(tmp_path):
    chain = ["single_to_experts", "mitosis_split:parent=0,addresses=[1,5],noise=0"]
    model = model_of(DATA / "wallclock_single.pt")
    save_file(model, tmp_path / "theirs.safetensors")
    torch.save(model, tmp_path / "bare.pt")
    vc.convert(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", transforms=chain)
    vc.convert(tmp_path / "bare.pt", tmp_path / "split.pt", transforms=chain)
    held, split = load_file(tmp_path / "ours.safetensors"), load(tmp_path / "split.pt")["model"]
    assert_same({name: held[name] for name in split}, dict(split))
    assert held.keys() == split.keys()
    assert [record.name for record in vc.open(tmp_path / "ours.safetensors").history] == [
        "single_to_experts",
        "mitosis_split",
    ]


@pytest.mark.parametrize("way", ["back.safetensors", "between.pt", "between/", "shards"])
def test_what_others_wrote_into_the_metadata_survives_there_and_back(way, tmp_path):
    texts = {"format": "pt", "author": "someone", "total_size": "five", "notes": 'é "quoted"\n'}
    save_file(foreign_model(), tmp_path / "theirs.safetensors", metadata=texts)
    vc.convert(tmp_path / "theirs.safetensors", f"{tmp_path}/{way}", to=SHARDS if way == "shards" else None)
    vc.convert(
        tmp_path / way, tmp_path / "again.safetensors", transforms=["mitosis_split:parent=11,addresses=[11],noise=0"]
    )
    with safetensors.safe_open(tmp_path / "again.safetensors", "torch") as file:
        found = file.metadata()
    assert {key: found[key] for key in found if key != "vraxion_ckpt"} == texts
    assert vc.open(tmp_path / "again.safetensors").num_experts == EXPERTS + 1


@pytest.mark.parametrize("prefix", ["model", "pytorch_model", "diffusion_pytorch_model.fp16"])
@pytest.mark.parametrize("named", ["folder", "index"])
def test_a_repository_of_shards_is_read_by_its_folder_and_by_its_index(prefix, named, tmp_path):
    folder = hf_folder(tmp_path / "repo", prefix)
    source = folder if named == "folder" else folder / f"{prefix}.safetensors.index.json"
    assert_foreign(source)
    vc.convert(source, tmp_path / "bare.pt", losses="ignore")
    bare = load(tmp_path / "bare.pt")
    assert_same({name: bare[name] for name in foreign_model()}, dict(foreign_model()))


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "model-00001-of-00003.fp16.safetensors"])
def test_one_shard_of_several_is_no_checkpoint(name, tmp_path, cli):
    folder = hf_folder(tmp_path / "repo")
    shutil.copy(folder / "model-00002-of-00003.safetensors", tmp_path / name)
    code, said = cli("convert", tmp_path / name, tmp_path / "out.pt")
    assert (code, "open their folder or its index" in said) == (8, True)
    vc.convert(SOURCE, tmp_path / "ours", to=SHARDS)
    next((tmp_path / "ours").glob("*-00001-of-*")).rename(tmp_path / "renamed.safetensors")
    with pytest.raises(InconsistentError, match="one of several shards"):
        vc.open(tmp_path / "renamed.safetensors")


def test_a_whole_checkpoint_may_be_called_like_a_shard(tmp_path):
    path = tmp_path / "run-00001-of-00002.safetensors"
    vc.convert(SOURCE, path)
    assert vc.open(path).num_experts == 3


def test_a_folder_with_one_file_is_read(tmp_path):
    (tmp_path / "repo").mkdir()
    save_file(foreign_model(), tmp_path / "repo/model.safetensors")
    (tmp_path / "repo/config.json").write_text("{}")
    assert_foreign(tmp_path / "repo")


def test_a_folder_that_holds_two_checkpoints_is_not_guessed_at(tmp_path):
    folder = hf_folder(tmp_path / "repo")
    save_file({"other": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(InconsistentError, match=r"model.safetensors.index.json and model.safetensors"):
        vc.open(folder)
    assert_foreign(folder / INDEX)
    (folder / "model.safetensors").unlink()
    for name in ("a", "b"):
        shutil.copy(folder / INDEX, folder / f"{name}.safetensors.index.json")
    assert_foreign(folder)  # the usual name goes before others, as in Hugging Face's own tools
    (folder / INDEX).unlink()
    with pytest.raises(InconsistentError, match="give the path of the one to read"):
        vc.open(folder)
    assert_foreign(folder / "a.safetensors.index.json")


def test_an_indexs_metadata_is_kept_but_for_what_a_split_makes_untrue(tmp_path):
    folder = hf_folder(tmp_path / "repo", total_parameters=5, made={"by": ["x", 1.5]})
    small = "safetensors:max_shard_size=1KB"
    split = "mitosis_split:parent=1,addresses=[1],noise=0"
    vc.convert(folder, tmp_path / "grown", to=small, transforms=[split], neighbours="ignore")
    metadata = json.loads((tmp_path / "grown" / INDEX).read_text())["metadata"]
    assert metadata["made"] == {"by": ["x", 1.5]}
    assert "total_parameters" not in metadata
    # The metadata of a file has room for text alone.
    vc.convert(tmp_path / "grown", tmp_path / "one.safetensors", losses="ignore")
    vc.convert(tmp_path / "one.safetensors", tmp_path / "again", to=small)
    assert json.loads((tmp_path / "again" / INDEX).read_text())["metadata"]["made"] == {"by": ["x", 1.5]}


def test_text_in_an_index_that_no_file_can_hold_is_refused(tmp_path):
    folder = hf_folder(tmp_path / "repo", note="\ud800")
    with pytest.raises(InconsistentError, match="not valid Unicode"):
        vc.convert(folder, tmp_path / "a.safetensors", losses="ignore")


def test_an_empty_file_of_the_library_is_carried_and_is_no_checkpoint_of_torch(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    vc.convert(tmp_path / "empty.safetensors", tmp_path / "copy.safetensors")
    assert load_file(tmp_path / "copy.safetensors") == {}
    with pytest.raises(InconsistentError, match="holds nothing"):
        vc.convert(tmp_path / "empty.safetensors", tmp_path / "empty.pt")


def test_training_state_that_another_tool_has_kept_without_its_document_is_refused(tmp_path):
    vc.convert(SOURCE, tmp_path / "a.safetensors")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata={"format": "pt"})
    with pytest.raises(InconsistentError, match="the metadata that describes it was lost"):
        vc.open(tmp_path / "b.safetensors")


def test_a_file_whose_tensors_lie_at_odd_places_is_read(tmp_path):
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2, 1], "data_offsets": [3, 11]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [11, 19]},
    }
    data = bytes(range(1, 20))
    (tmp_path / "odd.safetensors").write_bytes(file_of(header, data))
    state = vc.open(tmp_path / "odd.safetensors").state_dict()
    assert b"".join(map(bits, state.values())) == data
    assert not any(tensor.data_ptr() % tensor.itemsize for tensor in state.values())


# --- headers that must not be believed ---


def file_of(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def tensor(start: int = 0, stop: int = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def one(**changes: Any) -> bytes:
    return file_of({"w": {**tensor(), **changes}}, b"1234")


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
NEXT = '{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"

BAD: dict[str, tuple[bytes, type[CkptError], str]] = {
    "empty file": (b"", CorruptError, "not a safetensors file"),
    "seven bytes": (b"1234567", CorruptError, "not a safetensors file"),
    "text": (b"hello, this is not a checkpoint\n" * 9, CorruptError, "not a safetensors file"),
    "HTML": (b"<!DOCTYPE html><html><body>404</body></html>", CorruptError, "not a safetensors file"),
    "git-lfs pointer": (LFS, CorruptError, "git lfs pull"),
    "header beyond the file": ((100).to_bytes(8, "little") + b"{}", CorruptError, "100 of 10 bytes"),
    "header of 2^63 bytes": ((2**63).to_bytes(8, "little") + b"{}", CorruptError, f"{2**63} of 10 bytes"),
    "header of no bytes": ((0).to_bytes(8, "little"), CorruptError, "does not begin with {"),
    "header is a list": (file_of([]), CorruptError, "does not begin with {"),
    "spaces before the header": (file_of(b" {}"), CorruptError, "does not begin with {"),
    "not UTF-8": (file_of(b'{"\xff":' + ENTRY.encode() + b"}", b"1234"), CorruptError, "not UTF-8"),
    "not JSON": (file_of(b'{"w":'), CorruptError, "not JSON"),
    "more than JSON": (file_of(b"{}{}"), CorruptError, "not JSON"),
    "NUL after the header": (file_of(b"{}\0\0\0\0\0\0"), CorruptError, "not JSON"),
    "NaN": (file_of(b'{"w":NaN}'), CorruptError, "NaN"),
    "nested 100,000 deep": (file_of(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), LimitError, "nested"),
    "six million lists": (file_of(b'{"w":[' + b"[]," * 3_000_000 + b"[]]}"), LimitError, "5000000 values"),
    "key twice": (file_of(f'{{"a":{ENTRY},"a":{NEXT}}}'.encode(), bytes(8)), CorruptError, "[a]: its header"),
    "key twice, spelt \\u0061": (
        file_of(f'{{"a":{ENTRY},"\\u0061":{NEXT}}}'.encode(), bytes(8)),
        CorruptError,
        "the key occurs twice",
    ),
    "key twice in the metadata": (
        file_of(b'{"__metadata__":{"x":"1","\\u0078":"2"}}'),
        CorruptError,
        "[x]: its header is damaged: the key occurs twice",
    ),
    "metadata twice": (file_of(b'{"__metadata__":{},"__metadata__":{}}'), CorruptError, "occurs twice"),
    "dtype twice": (
        file_of(b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        CorruptError,
        "[dtype]",
    ),
    "overlap": (file_of({"a": tensor(), "b": tensor(2, 6)}, bytes(6)), CorruptError, "[b]: its bytes overlap"),
    "the same place": (file_of({"a": tensor(), "b": tensor()}, bytes(4)), CorruptError, "[b]: its bytes overlap"),
    "hole": (file_of({"a": tensor(), "b": tensor(5, 9)}, bytes(9)), CorruptError, "[b]: its bytes leave a hole"),
    "hole at the beginning": (file_of({"a": tensor(1, 5)}, bytes(5)), CorruptError, "[a]: its bytes leave a hole"),
    "trailing byte": (file_of({"w": tensor()}, bytes(5)), CorruptError, "1 byte left after the last tensor"),
    "bytes and no tensor": (file_of({}, bytes(5)), CorruptError, "5 bytes left"),
    "missing byte": (file_of({"w": tensor()}, bytes(3)), CorruptError, "1 byte missing"),
    "size of another shape": (one(shape=[2]), CorruptError, "[w]: takes 4 bytes, but its shape [2] of F32 needs 8"),
    "backwards": (one(data_offsets=[4, 0]), CorruptError, "takes -4 bytes"),
    "negative place": (one(data_offsets=[-4, 0]), CorruptError, "[w]"),
    "three places": (one(data_offsets=[0, 4, 4]), CorruptError, "[w]"),
    "negative shape": (one(shape=[-1]), CorruptError, "[w]"),
    "negative twice": (one(shape=[-1, -1]), CorruptError, "[w]"),
    "shape of floats": (one(shape=[1.0]), CorruptError, "[w]"),
    "shape of bools": (one(shape=[True]), CorruptError, "[w]"),
    "shape as text": (one(shape="1"), CorruptError, "[w]"),
    "shape a number": (one(shape=1), CorruptError, "[w]"),
    "size as text": (one(shape=["1"]), CorruptError, "[w]"),
    "absurd shape": (file_of({"w": tensor(0, 0, [0, 2**62])}), LimitError, "[w]: has a shape with too many"),
    "absurd product": (file_of({"w": tensor(0, 0, [2**40, 0, 2**40])}), LimitError, "[w]: has a shape with too many"),
    "65 dimensions": (one(shape=[1] * 65), LimitError, "[w]: has a shape with too many"),
    "unknown dtype": (one(dtype="F13"), UnsupportedError, "[w]: is of dtype F13"),
    "dtype that torch has not": (one(dtype="F6_E2M3", shape=[5]), UnsupportedError, "F6_E2M3"),
    "dtype a number": (one(dtype=32), CorruptError, "[w]"),
    "further entry": (one(more=1), CorruptError, "[w]: must have dtype, shape and data_offsets"),
    "entry missing": (file_of({"w": {"dtype": "F32", "shape": [1]}}, bytes(4)), CorruptError, "[w]: must have"),
    "entry a list": (file_of({"w": []}), CorruptError, "[w]: must have"),
    "name empty": (file_of({"": tensor()}, bytes(4)), InconsistentError, "cannot be called ''"),
    "name with NUL": (file_of({"a\0b": tensor()}, bytes(4)), InconsistentError, r"cannot be called 'a\x00b'"),
    "name that is no Unicode": (file_of({"\ud800": tensor()}, bytes(4)), InconsistentError, r"called '\ud800'"),
    "tensor called __metadata__": (file_of({"__metadata__": tensor()}, bytes(4)), InconsistentError, "must hold text"),
    "metadata a list": (file_of({"__metadata__": ["x"]}), InconsistentError, "must hold text"),
    "metadata a number": (file_of({"__metadata__": {"step": 4}}), InconsistentError, "must hold text"),
    "metadata null": (file_of({"__metadata__": None}), InconsistentError, "must hold text"),
    "metadata that is no Unicode": (file_of(b'{"__metadata__":{"x":"\\ud800"}}'), CorruptError, "not valid Unicode"),
    "id of 5,000 digits": (
        file_of({f"head.experts.{'1' * 5000}.w": tensor()}, bytes(4)),
        InconsistentError,
        "an expert's tensor must be called",
    ),
    "experts with a hole": (
        file_of({"head.experts.0.w": tensor(), "head.experts.2.w": tensor(4, 8)}, bytes(8)),
        InconsistentError,
        "expert 1 is missing",
    ),
    "both kinds of head": (
        file_of({"head.single.w": tensor(), "head.experts.0.w": tensor(4, 8)}, bytes(8)),
        InconsistentError,
        "both head.single",
    ),
}


def assert_refused(cli: Any, source: Path, error: type[CkptError], says: str, *options: object) -> None:
    """Convert with the command line. Expect the exit code of `error`, and no files left behind."""
    out = source.parent / "out"
    out.mkdir()
    code, said = cli("convert", source, out / "new.pt", *options)
    assert code == error.exit_code, said
    assert said.startswith("error: ")
    assert says in said, said
    assert "Traceback" not in said
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("content", "error", "says"), BAD.values(), ids=BAD)
def test_a_bad_header_has_its_error_and_its_exit_code(content, error, says, tmp_path, cli):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    assert_refused(cli, path, error, says)
    with pytest.raises(error) as caught:
        vc.open(path)
    assert type(caught.value) is error
    assert caught.value.path == path


def test_a_sound_file_of_the_same_making_is_accepted(tmp_path):
    """The undamaged file is accepted, so the refusals above are due to the damage."""
    for content in (one(), file_of({"a": tensor(), "b": tensor(4, 8), "c": tensor(8, 8, [0, 2**48])}, bytes(8))):
        (tmp_path / "good.safetensors").write_bytes(content)
        assert vc.open(tmp_path / "good.safetensors").state_dict()


def bytes_read() -> int:
    """Return the number of bytes that this process has read, as counted by the operating system."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def test_a_giant_header_is_refused_without_reading_it(tmp_path):
    for length, size, error in ((2**63, 2**20, CorruptError), (2**30, 2**31, LimitError)):
        path = tmp_path / f"{length}.safetensors"
        with path.open("wb") as file:
            file.write(length.to_bytes(8, "little") + b"{")
            file.truncate(size)
        before = bytes_read()
        tracemalloc.start()
        with pytest.raises(error, match="header"):
            vc.open(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20
        assert bytes_read() - before < 2**20


def test_every_proper_prefix_is_refused(tmp_path):
    model = {"router_map": torch.zeros(4, dtype=torch.int64), "head.experts.0.w": torch.ones(2)}
    torch.save({"model": model, "step": 3, "losses": [0.5]}, tmp_path / "small.pt")
    vc.convert(tmp_path / "small.pt", tmp_path / "whole.safetensors", transforms=[SPLIT])
    whole, path = (tmp_path / "whole.safetensors").read_bytes(), tmp_path / "cut.safetensors"
    assert 500 < len(whole) < 3000
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptError):
            vc.open(path)
    path.write_bytes(whole)
    assert vc.open(path).num_experts == 2


def test_something_else_of_another_name_is_of_no_known_format(tmp_path, cli):
    (tmp_path / "x.bin").write_bytes(LFS)
    assert cli("inspect", tmp_path / "x.bin")[0] == UnknownFormatError.exit_code
    vc.convert(SOURCE, tmp_path / "y.bin", to="safetensors")
    assert vc.open(tmp_path / "y.bin").origin.format == "safetensors"


def test_a_fifo_is_refused_at_once(tmp_path, cli):
    os.mkfifo(tmp_path / "x.safetensors")
    code, said = cli("inspect", tmp_path / "x.safetensors", "--from", "safetensors")
    assert (code, "not a regular file" in said) == (4, True)


def test_a_file_replaced_while_it_is_opened_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(3)}, path)
    original = json_files.parse_json

    def parse_slowly(*args: Any) -> Any:
        save_file({"w": torch.zeros(3)}, tmp_path / "new.safetensors")
        (tmp_path / "new.safetensors").replace(path)
        return original(*args)

    monkeypatch.setattr(json_files, "parse_json", parse_slowly)
    with pytest.raises(vc.CkptError, match="changed while it was being read"):
        vc.open(path)


@pytest.mark.parametrize("name", ["x.safetensors", "many/model-00001-of-", f"many/{INDEX}"])
def test_a_source_that_changes_meanwhile_is_not_converted(name, tmp_path, monkeypatch):
    vc.convert(SOURCE, tmp_path / "x.safetensors")
    vc.convert(SOURCE, tmp_path / "many", to=SHARDS)
    path = next(file for file in tmp_path.rglob("*") if str(file.relative_to(tmp_path)).startswith(name))
    original = Staged.publish

    def publish(stage: Staged, *args: Any, **options: Any) -> None:
        os.utime(path)
        original(stage, *args, **options)

    monkeypatch.setattr(Staged, "publish", publish)
    with pytest.raises(vc.CkptError, match="changed while it was being read") as caught:
        vc.convert(tmp_path / name.split("/")[0], tmp_path / "new.pt")
    assert caught.value.path == path
    assert not (tmp_path / "new.pt").exists()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    vc.convert(DATA / "steps_experts2_sgd.pt", folder / "whole.safetensors")
    return (folder / "whole.safetensors").read_bytes(), folder / "mutated.safetensors"


PIECES = [b"{", b"}", b"[", b"]", b",", b'"', b"\\", b"-", b"0", b"9" * 30, b"null", b"\0", b"\xff", b"F32", b'"a":']


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), cuts=st.integers(1, 4))
def test_no_change_of_a_real_header_is_met_with_anything_but_an_error_of_ours(seed, cuts, fuzzed):
    whole, path = fuzzed
    length, dice = int.from_bytes(whole[:8], "little"), random.Random(seed)
    header = whole[8 : 8 + length]
    for _ in range(cuts):
        at = dice.randrange(length if dice.random() < 0.5 else 1500)  # half of them among names and places
        kind = dice.randrange(4)
        piece = dice.choice(PIECES) if kind else bytes([dice.randrange(256)])
        gone = dice.choice([0, 1, len(piece), dice.randrange(60)])
        header = header[:at] + (piece if kind < 3 else b"") + header[at + gone :]
    stated = len(header) if dice.random() < 0.9 else dice.randrange(2 ** dice.randrange(1, 65))
    path.write_bytes(stated.to_bytes(8, "little") + header + whole[8 + length :])
    with bounded():
        try:
            vc.open(path)
        except PluginError:  # which is how what a reader did not expect is wrapped
            raise
        except CkptError:
            pass


# --- an index that must not be believed ---


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / INDEX
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed))


def index_says(file: Any) -> Callable[[Path], None]:
    return lambda folder: change_index(folder, lambda i: i["weight_map"].update(theta=file))


PATHS = {
    "up": "../outside.safetensors",
    "up and down": "../repo/model-00003-of-00003.safetensors",
    "below": "sub/outside.safetensors",
    "absolute": "/dev/shm/outside.safetensors",
    "backslash": "sub\\outside.safetensors",
    "up with a backslash": "..\\outside.safetensors",
    "empty": "",
    "dot": ".",
    "dots": "..",
    "a list": ["model-00003-of-00003.safetensors"],
    "a number": 3,
    "null": None,
    "hidden": ".outside.safetensors",
    "suffix alone": ".safetensors",
    "no suffix": "outside.pt",
    "the index": INDEX,
    "NUL": "out\0side.safetensors",
}


@pytest.mark.parametrize("file", PATHS.values(), ids=PATHS)
def test_a_path_in_an_index_is_refused_before_anything_is_opened(file, tmp_path, cli, monkeypatch):
    folder = hf_folder(tmp_path / "repo")
    for place in (tmp_path / "outside.safetensors", folder / ".outside.safetensors"):
        save_file({"theta": foreign_model()["theta"]}, place)
    opened: list[Path] = []
    for name in (
        "vraxion_ckpt_adapters.safetensors.adapter.check_safetensors",
        "vraxion_ckpt_adapters.safetensors.files.check_safetensors",
        "vraxion_ckpt_adapters.safetensors.shards.check_safetensors",
        "vraxion_ckpt.formats.safetensors_file.load_safetensors",
    ):
        monkeypatch.setattr(name, lambda path, *_: opened.append(path))
    monkeypatch.setattr(safetensors, "safe_open", lambda path, *_, **__: opened.append(path))
    index_says(file)(folder)
    assert_refused(cli, folder, InconsistentError, "[theta]: the index lists the tensor in")
    assert opened == []


def fifo(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def link(name: str, to: str) -> Callable[[Path], None]:
    """Move a file out of the folder, and leave a link whose text is `to`."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside.safetensors")
        (folder / name).symlink_to(to.format(folder.parent))

    return damage


def resave(number: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / f"model-{number:05d}-of-00003.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return damage


def of_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: change_index(folder, change)


def index_is(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_bytes(content)


def drop(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


def stated(size: Any) -> Callable[[Path], None]:
    return of_index(lambda i: i["metadata"].update(total_size=size))


LAST = "model-00003-of-00003.safetensors"
TWICE = b'{"weight_map": {"theta": "model-00003-of-00003.safetensors", "theta": "model-00002-of-00003.safetensors"}}'

INDEXES: dict[str, tuple[Callable[[Path], Any], type[CkptError], str]] = {
    "file missing": (drop(LAST), InconsistentError, f"{LAST}: is missing"),
    "file unknown": (index_says("x.safetensors"), InconsistentError, "x.safetensors: is missing"),
    "file's name of no Unicode": (index_says("\ud800.safetensors"), InconsistentError, "is missing"),
    "file's name too long": (index_says("x" * 300 + ".safetensors"), StorageError, "File name too long"),
    "file a folder": (
        lambda folder: [drop(LAST)(folder), (folder / LAST).mkdir()],
        InconsistentError,
        "must be a regular file",
    ),
    "file a FIFO": (fifo(LAST), InconsistentError, f"{LAST}: must be a regular file"),
    "index a FIFO": (fifo(INDEX), InconsistentError, f"{INDEX}: must be a regular file"),
    "file a link to the outside": (link(LAST, "{}/outside.safetensors"), InconsistentError, "leads out"),
    "file a relative link to the outside": (link(LAST, "../outside.safetensors"), InconsistentError, "leads out"),
    "index a link to the outside": (link(INDEX, "../outside.safetensors"), InconsistentError, "leads out"),
    "file a link to itself": (link(LAST, LAST), InconsistentError, f"{LAST}: is missing"),
    "file truncated": (
        lambda folder: os.truncate(folder / LAST, (folder / LAST).stat().st_size - 1),
        CorruptError,
        f"{LAST}: its size does not match",
    ),
    "key not in its file": (
        resave(3, lambda t: t.pop("theta")),
        InconsistentError,
        f"[theta]: the index lists the tensor in {LAST}, which lacks it",
    ),
    "key said to be in another file": (
        index_says("model-00001-of-00003.safetensors"),
        InconsistentError,
        f"[theta]: the tensor is in {LAST}, but the index lists it in model-00001",
    ),
    "key in two files": (
        resave(1, lambda t: t.update(theta=torch.ones(2))),
        InconsistentError,
        f"[theta]: the tensor is in model-00001-of-00003.safetensors, but the index lists it in {LAST}",
    ),
    "key not listed": (
        resave(1, lambda t: t.update(more=torch.ones(2))),
        InconsistentError,
        "[more]: the tensor is in model-00001-of-00003.safetensors, but the index does not list it",
    ),
    "a file linked twice": (
        lambda folder: [
            drop("model-00001-of-00003.safetensors")(folder),
            os.link(folder / LAST, folder / "model-00001-of-00003.safetensors"),
        ],
        InconsistentError,
        "but the index lists it in",
    ),
    "total size too large": (stated(10**6), InconsistentError, "[metadata.total_size]: total_size is 1000000"),
    "total size as text": (stated("5"), InconsistentError, "[metadata.total_size]: total_size is '5'"),
    "total size null": (stated(None), InconsistentError, "[metadata.total_size]"),
    "no weight_map": (of_index(lambda i: i.pop("weight_map") and None), InconsistentError, "weight_map"),
    "weight_map a list": (of_index(lambda i: i.update(weight_map=[])), InconsistentError, "weight_map"),
    "metadata a list": (of_index(lambda i: i.update(metadata=[1])), InconsistentError, "[metadata]"),
    "a list": (index_is(b"[]"), InconsistentError, "weight_map"),
    "empty": (index_is(b""), CorruptError, "is not JSON"),
    "not UTF-8": (index_is(b'{"\xff": 1}'), CorruptError, "is not UTF-8"),
    "truncated": (index_is(b'{"weight_map": {"theta": '), CorruptError, "is not JSON"),
    "key twice": (index_is(TWICE), InconsistentError, "[theta]: the key occurs twice"),
    "NaN": (index_is(b'{"metadata": {"total_size": NaN}, "weight_map": {}}'), InconsistentError, "NaN"),
    "nested": (index_is(b"[" * 200_000), LimitError, "nested too deeply"),
    "six million lists": (index_is(b"[" + b"[]," * 3_000_000 + b"[]]"), LimitError, "5000000 values"),
    "giant": (lambda folder: os.truncate(folder / INDEX, 2**40), LimitError, "larger than 100000000 bytes"),
}


@pytest.mark.parametrize(("damage", "error", "says"), INDEXES.values(), ids=INDEXES)
def test_an_index_that_does_not_fit_is_refused(damage, error, says, tmp_path, cli):
    folder = hf_folder(tmp_path / "repo")
    damage(folder)
    assert_refused(cli, folder, error, says)


def test_a_folder_whose_one_file_leads_out_of_it_is_refused(tmp_path):
    (tmp_path / "repo").mkdir()
    save_file(foreign_model(), tmp_path / "outside.safetensors")
    (tmp_path / "repo/model.safetensors").symlink_to("../outside.safetensors")
    with pytest.raises(InconsistentError, match="leads out of the checkpoint"):
        vc.open(tmp_path / "repo")
    (tmp_path / "alias").symlink_to("outside.safetensors")
    assert_foreign(tmp_path / "alias")  # a file that was named itself may be a link


@pytest.mark.parametrize("payload", ["bare", "trained"])
def test_shards_of_two_saves_are_not_mixed(payload, tmp_path):
    """The saves differ only in values, like two saves of a run that stores no step."""
    for name, value in (("a", 0.0), ("b", 1.0)):
        model = OrderedDict({f"t{i}": torch.full((600,), 7.0) for i in range(4)})
        model["t2"][599] = value
        torch.save(model if payload == "bare" else {"model": model, "step": 4}, tmp_path / f"{name}.pt")
        vc.convert(tmp_path / f"{name}.pt", tmp_path / name, to=SHARDS)
    changed = [f for f in files_below(tmp_path / "a") if f.suffix == ".safetensors"]
    assert len(changed) == 4
    for file in changed:
        shutil.copytree(tmp_path / "a", tmp_path / "mixed")
        shutil.copy(tmp_path / "b" / file, tmp_path / "mixed" / file)
        with pytest.raises(InconsistentError, match="belongs to another save than the index"):
            vc.open(tmp_path / "mixed")
        shutil.rmtree(tmp_path / "mixed")


def test_every_prefix_of_every_shard_and_of_the_index_is_refused(tmp_path):
    vc.convert(SOURCE, tmp_path / "many", to="safetensors:max_shard_size=60KB")
    for file in files_below(tmp_path / "many"):
        whole = (tmp_path / "many" / file).read_bytes()
        for size in {*range(12), *range(0, len(whole), 1 + len(whole) // 25), len(whole) - 1}:
            (tmp_path / "many" / file).write_bytes(whole[:size])
            with pytest.raises((CorruptError, InconsistentError)):
                vc.open(tmp_path / "many")
        (tmp_path / "many" / file).write_bytes(whole)
    assert vc.open(tmp_path / "many").num_experts == 3


# --- writing ---


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(path: Path) -> dict[str, int]:
    files = [path] if path.is_file() else [path, *path.iterdir()]
    return {file.name: file.stat().st_mode & 0o777 for file in files}


@pytest.mark.parametrize("to", ["safetensors", SHARDS])
def test_new_files_have_the_umasks_mode_and_replaced_ones_keep_theirs(to, tmp_path):
    with umask(0o027):
        vc.convert(SOURCE, tmp_path / "new", to=to)
    found = modes(tmp_path / "new")
    if (tmp_path / "new").is_dir():
        assert found.pop("new") == 0o750
    assert set(found.values()) == {0o640}
    for file in [tmp_path / "new"] if to == "safetensors" else [*(tmp_path / "new").iterdir()]:
        file.chmod(0o604)
    vc.convert(SOURCE, tmp_path / "new", to=to, overwrite=True)
    found = modes(tmp_path / "new")
    if (tmp_path / "new").is_dir():
        assert found.pop("new") == 0o750
    assert set(found.values()) == {0o604}


def test_a_link_to_the_target_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "latest.safetensors").symlink_to("real/x.safetensors")
    vc.convert(SOURCE, tmp_path / "latest.safetensors")
    assert (tmp_path / "latest.safetensors").is_symlink()
    assert load_file(tmp_path / "real/x.safetensors").keys() >= model_of(SOURCE).keys()


def test_a_folder_of_shards_is_exchanged_whole_and_keeps_nothing_of_the_old(tmp_path):
    vc.convert(SOURCE, tmp_path / "many", to="safetensors:max_shard_size=1KB")
    with pytest.raises(UsageError, match="--overwrite"):
        vc.convert(SOURCE, tmp_path / "many", to=SHARDS)
    old = files_below(tmp_path / "many")
    vc.convert(DATA / "wallclock_single.pt", tmp_path / "many", to=SHARDS, overwrite=True)
    assert len(files_below(tmp_path / "many")) < len(old)
    assert load_folder(tmp_path / "many").keys() >= model_of(DATA / "wallclock_single.pt").keys()
    assert [entry.name for entry in tmp_path.iterdir()] == ["many"]


@pytest.mark.parametrize("name", ["config.json", "more.safetensors", "sub/x.safetensors", "named.safetensors/x"])
def test_files_of_others_in_a_folder_of_shards_are_not_deleted_with_it(name, tmp_path):
    vc.convert(SOURCE, tmp_path / "many", to=SHARDS)
    (tmp_path / "many" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "many" / name).write_text("precious")
    # A folder is not a shard, even if an index names it.
    change_index(tmp_path / "many", lambda i: i["weight_map"].update({"x": "named.safetensors"}))
    with pytest.raises(UsageError, match="not part of a safetensors checkpoint"):
        vc.convert(SOURCE, tmp_path / "many", to=SHARDS, overwrite=True)
    assert (tmp_path / "many" / name).read_text() == "precious"


@pytest.mark.parametrize("to", ["safetensors", SHARDS])
def test_everything_is_flushed_before_it_is_published(to, tmp_path, monkeypatch):
    flushed: set[Path] = set()
    fsync, rename = system_calls.fsync, system_calls.rename_new

    def note(path: Path) -> None:
        flushed.add(path)
        fsync(path)

    def look(source: Path, target: Path) -> None:
        assert target == tmp_path / "new"
        assert {source, *source.rglob("*")} <= flushed
        rename(source, target)
        flushed.clear()

    monkeypatch.setattr(system_calls, "fsync", note)
    monkeypatch.setattr(system_calls, "rename_new", look)
    vc.convert(SOURCE, tmp_path / "new", to=to)
    assert flushed == {tmp_path}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A limit on the file size simulates a full disk: writes fail in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [100, 9000])  # within the header, within the tensors
@pytest.mark.parametrize(
    ("target", "to"), [("old.safetensors", "safetensors"), ("old", "safetensors:max_shard_size=1MB")]
)
def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(target, to, size, tmp_path):
    vc.convert(DATA / "evolution_latest.pt", tmp_path / target, to=to)
    old = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with largest_file(size), pytest.raises(StorageError, match="File too large") as caught:
        vc.convert(SOURCE, tmp_path / target, to=to, overwrite=True)
    assert caught.value.path.is_relative_to(tmp_path / target)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == old


def test_a_dry_run_writes_nothing_and_knows_the_losses(tmp_path):
    done = vc.convert(SOURCE, tmp_path / "x.safetensors", to=WEIGHTS, dry_run=True, losses="ignore")
    assert done.losses
    assert list(tmp_path.iterdir()) == []


# --- weights only ---


def test_weights_alone_are_a_loss_that_is_told_thing_by_thing(tmp_path):
    with pytest.raises(LossError) as refused:
        vc.convert(DATA / "modular_experts3", tmp_path / "x.safetensors", to=WEIGHTS)
    assert not (tmp_path / "x.safetensors").exists()
    for thing in ("the optimizer's state", "the payload's scaler, step, losses", "the experts' lifecycle rows"):
        assert thing in str(refused.value)
    assert "the planned split" not in str(refused.value)
    visits = ("arc_meta", {"visits": DATA / "expected/modular_experts3.visits.json"})
    done = vc.convert(
        DATA / "modular_experts3", tmp_path / "x.safetensors", to=WEIGHTS, transforms=[visits], losses="ignore"
    )
    assert [loss.what for loss in done.losses][-1] == "the planned split"
    assert len(done.losses) == 4
    assert vc.open(tmp_path / "x.safetensors").plan is None


@pytest.mark.parametrize("to", [WEIGHTS, f"{WEIGHTS},max_shard_size=1KB"])
def test_weights_alone_hold_no_tensor_of_ours_and_keep_router_head_and_history(to, tmp_path):
    with pytest.warns(vc.CkptWarning, match="weights_only leaves it out"):
        vc.convert(DATA / "modular_gc", tmp_path / "x", to=to, transforms=[SPLIT], losses="warn")
    held = load_file(tmp_path / "x") if (tmp_path / "x").is_file() else load_folder(tmp_path / "x")
    vc.convert(DATA / "modular_gc", tmp_path / "all", to="modular", transforms=[SPLIT])
    model = model_of(tmp_path / "all")
    assert_same({name: held[name] for name in model}, model)
    assert held.keys() == model.keys()
    found = vc.open(tmp_path / "x")
    assert (found.optimizer, found.payload, found.plan) == (None, {}, None)
    assert found.lifecycle == dict.fromkeys(range(4), vc.Lifecycle())
    assert found.router_map.tolist() == model["router_map"].tolist()
    assert (list(found.head.experts), found.head.deleted) == ([0, 2, 3], frozenset({1}))
    assert [record.name for record in found.history] == ["mitosis_split"]
    vc.convert(tmp_path / "x", tmp_path / "x.pt")
    assert load(tmp_path / "x.pt").keys() == {"model", "vraxion_ckpt"}


def test_weights_alone_lose_nothing_of_what_is_weights_alone(tmp_path):
    """Neither the dialect nor the metadata of other software."""
    assert vc.convert(DATA / "raw_state_dict.pt", tmp_path / "x.safetensors", to=WEIGHTS).losses == ()
    vc.convert(tmp_path / "x.safetensors", tmp_path / "back.pt")
    assert_same(load(tmp_path / "back.pt"), load(DATA / "raw_state_dict.pt"))
    save_file(foreign_model(), tmp_path / "theirs.safetensors", metadata={"author": "someone"})
    vc.convert(tmp_path / "theirs.safetensors", tmp_path / "y.safetensors", to=WEIGHTS)
    # A split adds an entry to the payload, so there is something to leave out.
    options: dict[str, Any] = {"to": WEIGHTS, "transforms": [SPLIT.replace(",3", "")], "losses": "ignore"}
    assert vc.convert(tmp_path / "theirs.safetensors", tmp_path / "z.safetensors", **options).losses
    for name in ("y.safetensors", "z.safetensors"):
        with safetensors.safe_open(tmp_path / name, "torch") as file:
            assert file.metadata()["author"] == "someone"


# --- options, inspect ---


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("max_shard_size=0", "greater than 0"),
        ("max_shard_size=0.1B", "greater than 0"),
        ("max_shard_size=-5KB", "max_shard_size"),
        ("max_shard_size=abc", "max_shard_size"),
        ("max_shard_size=5XB", "max_shard_size"),
        ("weights_only=perhaps", "weights_only"),
        ("max_shard_sise=5GB", "did you mean 'max_shard_size'?"),
    ],
)
def test_a_wrong_option_is_a_usage_error(option, says, tmp_path, cli):
    code, said = cli("convert", SOURCE, tmp_path / "x", "--to", f"safetensors:{option}")
    assert code == 2
    assert says in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "to", "says"),
    [
        ("x.safetensors/", "safetensors", "ends in /"),
        ("folder", "safetensors", "is not a file"),
        ("file", SHARDS, "is not a directory"),
    ],
)
def test_a_file_is_no_folder_and_a_folder_no_file(target, to, says, tmp_path, cli):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    code, said = cli("convert", SOURCE, f"{tmp_path}/{target}", "--overwrite", *(["--to", to] if to else []))
    assert code == 2
    assert says in said
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_a_source_that_is_the_target_or_around_it_is_refused(tmp_path):
    vc.convert(SOURCE, tmp_path / "many", to=SHARDS)
    before = {file: (tmp_path / "many" / file).read_bytes() for file in files_below(tmp_path / "many")}
    for source in (tmp_path / "many", tmp_path / "many" / INDEX):
        for target, to in ((tmp_path / "many", SHARDS), (tmp_path / "many/x.safetensors", None)):
            with pytest.raises(UsageError):
                vc.convert(source, target, to=to, overwrite=True)
    assert {file: (tmp_path / "many" / file).read_bytes() for file in files_below(tmp_path / "many")} == before


def test_inspect_tells_that_nothing_would_be_lost(tmp_path, capsys):
    from vraxion_ckpt.cli import main

    vc.convert(SOURCE, tmp_path / "x.safetensors")
    for path, name in ((SOURCE, "pt"), (tmp_path / "x.safetensors", "safetensors")):
        with pytest.raises(SystemExit) as stop:
            main(["inspect", str(path)])
        assert not stop.value.code
        said = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert f"format {name}," in said
        assert "would lose nothing as modular, pt or safetensors" in said


def test_inspect_opens_only_the_shards_that_it_lists_to_tell_losses(tmp_path, monkeypatch):
    count = 4096
    for folder in ("system", "experts"):
        (tmp_path / folder).mkdir()
    model = {"router_map": torch.arange(count), "theta": torch.ones(2)}
    torch.save({"model": model, "num_experts": count}, tmp_path / "system/router.state")
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "experts/expert_000.pt")
    for i in range(1, count):
        os.link(tmp_path / "experts/expert_000.pt", tmp_path / f"experts/expert_{i:03d}.pt")
    row = {"contrib": 0.0, "created_step": 0, "last_used_step": 0, "tenured": False}
    rows = [{"id": i, **row} for i in range(count)]
    meta = {"source_checkpoint": "x.pt", "num_experts": count, "experts": rows}
    (tmp_path / "experts/meta.json").write_text(json.dumps(meta))
    opened: list[Path] = []
    original = torch_reader.check_archive

    def noted(path: Path) -> Any:
        opened.append(path)
        return original(path)

    monkeypatch.setattr(torch_reader, "check_archive", noted)
    found = vc.inspect(tmp_path)
    assert found.losses["safetensors"] == ()
    assert found.num_experts == count
    shown = [tmp_path / f"experts/expert_{i:03d}.pt" for i in range(16)]  # whose shapes are listed
    assert opened == [tmp_path / "system/router.state", *shown]
