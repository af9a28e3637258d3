"""Slices of a distributed save, as torch's HuggingFaceStorageWriter writes them, put together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import files_below, load
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

import vraxion_ckpt as vc
from vraxion_ckpt.errors import ChangedError, InconsistentError

RANKS = 3
# Name of a tensor → the file number in which every rank saves its slice.
FILES = {"rows": 1, "columns": 2, "grid": 2, "short": 1, "bytes": 2, "none": 1, "here": 1, "there": 2}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "rows": torch.randn(10, 6, generator=generator),
        "columns": torch.randn(4, 7, generator=generator).to(torch.bfloat16),
        "grid": torch.randn(5, 4, 6, generator=generator),
        "short": torch.randn(1, generator=generator),
        "bytes": torch.randn(6, 2, generator=generator).to(torch.float8_e4m3fn),
        "none": torch.empty(0, 3),
        "here": torch.randn(3, 2, generator=generator),
        "there": torch.randn(2, generator=generator),
    }


def cells(name: str, rank: int) -> tuple[slice, ...]:
    """Return which part of a tensor a rank saves. Ranks after the end of a tensor save an empty slice."""
    one = slice(rank * 4, rank * 4 + 4)
    return {
        "columns": (slice(None), slice(rank * 3, rank * 3 + 3)),
        "grid": (slice(None), slice(0, 4), slice(rank * 2, rank * 2 + 2)),
        "here": (slice(0, 3 if rank == 1 else 0),),
        "there": (slice(0, 2 if rank == 0 else 0),),
    }.get(name, (one,))


def save_slices(folder: Path, leave_out: dict[str, int] | None = None) -> Path:
    """Write the files of all ranks. `leave_out` names tensors and the rank whose slice is missing."""
    folder.mkdir()
    for rank in range(RANKS):
        for number in (1, 2):
            held, offsets = {}, {}
            for name, tensor in tensors().items():
                if FILES[name] != number or (leave_out or {}).get(name) == rank:
                    continue
                place = cells(name, rank)
                part = tensor[place]
                if part.numel() or name in ("short", "none"):
                    held[name] = part.contiguous()
                    starts = [each.indices(size)[0] for each, size in zip(place, tensor.shape, strict=False)]
                    offsets[name] = {"saved_offsets": [*starts, *[0] * (tensor.ndim - len(starts))]}
            metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
            save_file(held, folder / f"shard-{rank + 1:05d}-model-{number:05d}-of-00002.safetensors", metadata=metadata)
    return folder


READ = f"safetensors:ranks={RANKS}"


@pytest.mark.parametrize("target", ["a.pt", "a.safetensors", "a"])
def test_slices_are_put_together_as_torch_does(target, tmp_path):
    folder = save_slices(tmp_path / "save")
    (tmp_path / "torch").mkdir()
    consolidate_safetensors_files(str(folder), str(tmp_path / "torch"), fqn_to_index_mapping=FILES)
    theirs = {k: v for file in (tmp_path / "torch").glob("*.safetensors") for k, v in load_file(file).items()}
    vc.convert(folder, tmp_path / target, from_=READ, to="safetensors:max_shard_size=200B" if target == "a" else None)
    found = vc.open(tmp_path / target).state_dict()
    expected = tensors()
    assert found.keys() == theirs.keys() == expected.keys()
    for name, tensor in expected.items():
        for other in (found[name], theirs[name]):
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(other.view(torch.uint8), tensor.view(torch.uint8))
    assert vc.diff(folder, tmp_path / target, from_=READ, from_b="pt" if target == "a.pt" else "safetensors").identical
    assert vc.diff(tmp_path / "torch", tmp_path / target).identical
    assert vc.inspect(folder, from_=READ).dialect == "slices of a distributed save"


def test_the_number_of_ranks_must_be_stated_and_all_their_files_be_there(tmp_path, cli):
    folder = save_slices(tmp_path / "save")
    code, said = cli("inspect", folder)
    assert (code, f"--from safetensors:ranks={RANKS}" in said) == (8, True)
    for ranks, says in (
        (RANKS + 1, "lacks shard-00004-model-00001"),
        (RANKS - 1, "rank 3, but there are 2 ranks"),
    ):
        with pytest.raises(InconsistentError, match=says):
            vc.open(folder, from_=f"safetensors:ranks={ranks}")
    for file in files_below(folder):
        with pytest.raises(InconsistentError, match=r"one of several shards|file of a distributed save"):
            vc.open(folder / file)
        (folder / file).rename(tmp_path / "kept")
        with pytest.raises(InconsistentError, match=f"lacks {str(file)[:23]}"):
            vc.open(folder, from_=READ)
        (tmp_path / "kept").rename(folder / file)
    shutil.copy(folder / "shard-00001-model-00001-of-00002.safetensors", tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(InconsistentError, match="may have slices of tensors under the names"):
            vc.open(path)


@pytest.mark.parametrize(
    ("leave_out", "says"),
    [
        ({"rows": 0}, "rows.*a slice is missing"),
        ({"rows": 1}, "rows.*overlap or leave a hole"),
        ({"columns": 1}, "columns.*overlap or leave a hole"),
        ({"grid": 0}, "grid.*a slice is missing"),
    ],
)
def test_a_hole_is_refused(leave_out, says, tmp_path):
    with pytest.raises(InconsistentError, match=says):
        vc.open(save_slices(tmp_path / "save", leave_out), from_=READ)


def rewritten(offsets, change):
    change(offsets)
    return json.dumps(offsets)


@pytest.mark.parametrize(
    ("info", "says"),
    [
        (lambda _: "{", "does not parse"),
        (lambda _: "[]", "does not state where the slice begins"),
        (lambda o: rewritten(o, lambda x: x.pop("rows")), "does not state where the slice begins"),
        (lambda o: rewritten(o, lambda x: x["rows"].update(saved_offsets=[4])), "does not state where"),
        (lambda o: rewritten(o, lambda x: x["rows"].update(saved_offsets=[-4, 0])), "does not state where"),
        (lambda o: rewritten(o, lambda x: x["rows"].update(saved_offsets=[True, 0])), "does not state where"),
        (lambda o: rewritten(o, lambda x: x["rows"].update(saved_offsets=[0, 0])), "overlap or leave a hole"),
        (lambda o: rewritten(o, lambda x: x["rows"].update(saved_offsets=[3, 0])), "overlap or leave a hole"),
        (lambda o: rewritten(o, lambda x: x["rows"].update(saved_offsets=[2**47, 0])), "overlap or leave a hole"),
    ],
)
def test_offsets_that_do_not_fit_are_refused(info, says, tmp_path):
    folder = save_slices(tmp_path / "save")
    file = folder / "shard-00002-model-00001-of-00002.safetensors"
    held = load_file(file)
    offsets = {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in held.items()}
    offsets["rows"] = {"saved_offsets": [4, 0]}
    save_file(held, file, metadata={"DCP_SHARDING_INFO": info(offsets)})
    with pytest.raises(InconsistentError, match=says):
        vc.open(folder, from_=READ)


def test_a_file_without_offsets_or_of_another_dtype_is_refused(tmp_path):
    folder = save_slices(tmp_path / "save")
    file = folder / "shard-00003-model-00001-of-00002.safetensors"
    held = load_file(file)
    save_file(held, file)
    with pytest.raises(InconsistentError, match="does not state where its slices begin"):
        vc.open(folder, from_=READ)
    held["rows"] = held["rows"].half()
    offsets = {name: {"saved_offsets": [8, 0] if name == "rows" else [0] * t.ndim} for name, t in held.items()}
    save_file(held, file, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    with pytest.raises(InconsistentError, match=r"rows.*another dtype"):
        vc.open(folder, from_=READ)


def test_a_slice_that_two_ranks_have_is_refused(tmp_path):
    folder = save_slices(tmp_path / "save")
    file = folder / "shard-00002-model-00001-of-00002.safetensors"
    held = {**load_file(file), "short": torch.ones(1)}
    offsets = {name: {"saved_offsets": [4, 0] if name == "rows" else [0] * t.ndim} for name, t in held.items()}
    save_file(held, file, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    with pytest.raises(InconsistentError, match=r"short.*has the same slice as shard-00001"):
        vc.open(folder, from_=READ)


def test_slices_that_change_meanwhile_are_not_put_together(tmp_path):
    found = vc.open(save_slices(tmp_path / "save"), from_=READ)
    for file in files_below(tmp_path / "save"):
        (tmp_path / "save" / file).write_bytes(b"")
    with pytest.raises(ChangedError):
        found.state_dict()["rows"]


def test_an_edit_puts_slices_together(tmp_path):
    folder = save_slices(tmp_path / "save")
    (folder / "config.json").write_text("{}")
    vc.edit(folder, from_=READ, optimizer="drop")
    names = {file.name for file in files_below(folder)}
    assert names > {"config.json", "model.safetensors.index.json"}
    assert not any(name.startswith("shard-") for name in names)
    assert torch.equal(vc.open(folder).state_dict()["rows"], tensors()["rows"])


def test_what_a_single_rank_of_torch_has_saved_is_whole(tmp_path):
    model = {"x": torch.randn(3, 4), "n": torch.tensor(3.0), "i": torch.arange(4)}
    dcp.save(model, storage_writer=HuggingFaceStorageWriter(path=str(tmp_path / "save")), no_dist=True)
    vc.convert(tmp_path / "save", tmp_path / "a.pt")
    assert {name: tensor.tolist() for name, tensor in load(tmp_path / "a.pt").items()} == {
        name: model[name].tolist() for name in sorted(model)
    }
    (shard,) = (tmp_path / "save").glob("*.safetensors")
    info = {name: {"saved_offsets": [1] * tensor.ndim} for name, tensor in model.items()}
    save_file(model, shard, metadata={"DCP_SHARDING_INFO": json.dumps(info)})
    with pytest.raises(InconsistentError, match="is a slice of a tensor, but the index lists it as a whole"):
        vc.open(tmp_path / "save")
