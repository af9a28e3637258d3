"""Folders that transformers writes and loads: what comes back gives the same logits, bit by bit."""

import json
import shutil

import pytest
import torch
from support import files_below

import vraxion_ckpt as vc
from vraxion_ckpt.plugin_api import CkptWarning, TransformError

pytestmark = pytest.mark.slow

SHARDS = "safetensors:max_shard_size=8KB"
WHOLE = "safetensors:max_shard_size=1GB"


def tiny(kind):
    """Return a small random model. Not imported above, since `make test-lowest` collects this file, too."""
    import transformers

    size = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    if kind == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**size, num_local_experts=4)).eval()
    config = transformers.LlamaConfig(**size, tie_word_embeddings=kind == "tied llama")
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(params=["llama", "tied llama", "mixtral"])
def model(request):
    return tiny(request.param)


def tokenizer(folder):
    """Save a tokenizer beside a model."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def assert_loads(folder, model):
    """Let transformers load a folder, strictly, and compare what it computes."""
    import transformers

    found, info = type(model).from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    assert torch.equal(logits(found.eval()), logits(model))
    assert transformers.AutoTokenizer.from_pretrained(folder).decode([1, 0]) == "b a"


def saved(folder, model, **options):
    model.save_pretrained(folder, **options)
    tokenizer(folder)
    return folder


@pytest.mark.parametrize("size", [None, "8KB"])
def test_a_model_comes_back_with_the_same_logits(model, size, tmp_path):
    options = {} if size is None else {"max_shard_size": size}
    source = saved(tmp_path / "source", model, **options)
    beside = {name for name in files_below(source) if not name.name.startswith("model")}
    for start, end, to in (("source", "shards", SHARDS), ("shards", "whole", WHOLE), ("whole", "again", SHARDS)):
        done = vc.convert(tmp_path / start, tmp_path / end, to=to)
        assert set(done.carried) == set(map(str, beside))
        assert_loads(tmp_path / end, model)
        assert vc.diff(source, tmp_path / end).identical
    for name in beside:
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
    saved(tmp_path / "theirs", model, max_shard_size="8KB")
    theirs, ours = ({n.name for n in files_below(tmp_path / each)} for each in ("theirs", "again"))
    assert {name.partition("-of-")[0] for name in ours} >= {"model-00001", "model.safetensors.index.json"}
    assert ours - theirs <= {name for name in ours if name.startswith("model-")}
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())
    stated = json.loads((tmp_path / "theirs/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stated["weight_map"].keys()
    assert index["metadata"]["total_size"] == stated["metadata"]["total_size"]


def test_a_model_comes_back_from_one_file_when_its_other_files_are_put_beside_it(model, tmp_path):
    source = saved(tmp_path / "source", model)
    vc.convert(source, tmp_path / "a.pt", losses="ignore")
    with pytest.warns(CkptWarning, match=r"left behind: config.json, generation_config.json, tokenizer.json"):
        vc.convert(tmp_path / "a.pt", tmp_path / "back", to=WHOLE)
    for name in files_below(source):
        if not (tmp_path / "back" / name).exists():
            shutil.copy(source / name, tmp_path / "back" / name)
    assert_loads(tmp_path / "back", model)
    torch.save(model.state_dict(), tmp_path / "b.pt")
    if model.config.model_type != "mixtral":  # whose experts are packed in memory
        assert vc.diff(source, tmp_path / "b.pt").identical


@pytest.mark.parametrize("size", [None, "8KB"])
def test_an_edit_keeps_a_folder_loadable(model, size, tmp_path):
    options = {} if size is None else {"max_shard_size": size}
    source = saved(tmp_path / "source", model, **options)
    (source / "README.md").write_text("mine")
    before = {name: (source / name).read_bytes() for name in files_below(source)}
    vc.edit(source)
    assert {name: (source / name).read_bytes() for name in files_below(source)} == before
    vc.edit(source, optimizer="drop")  # writes all weights anew
    assert_loads(source, model)
    for name, content in before.items():
        assert name.name.startswith("model") or (source / name).read_bytes() == content


def test_a_trainers_folder_is_named_and_what_would_go_stale_is_refused(tmp_path):
    from test_neighbours import Scale

    model = tiny("llama")
    source = saved(tmp_path / "checkpoint-10", model)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save(optimizer.state_dict(), source / "optimizer.pt")
    torch.save({"last_epoch": 10}, source / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, source / "rng_state.pth")
    (source / "trainer_state.json").write_text('{"global_step": 10}')
    assert vc.inspect(source).neighbours["optimizer.pt"].holds == "the optimizer"
    with pytest.warns(CkptWarning, match=r"not read: optimizer.pt, rng_state.pth, scheduler.pt, trainer_state.json"):
        vc.convert(source, tmp_path / "same", to=SHARDS)
    assert (tmp_path / "same/optimizer.pt").read_bytes() == (source / "optimizer.pt").read_bytes()
    assert_loads(tmp_path / "same", model)
    with pytest.raises(TransformError, match=r"optimizer\.pt"):
        vc.edit(source, transforms=[Scale()])
    assert_loads(source, model)
    vc.edit(source, transforms=[Scale()], neighbours="ignore")
    assert not (source / "optimizer.pt").exists()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    assert_loads(source, model)
