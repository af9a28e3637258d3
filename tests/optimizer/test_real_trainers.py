"""Real trainers save, are split, and resume by their own code, as if the model had grown in memory."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vraxion_ckpt as vc

pytestmark = pytest.mark.slow

RING = 16
CHAIN = ["single_to_experts:noise=0", "mitosis_split:parent=0,addresses=[0-3],noise=0"]


class Head(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        if experts:
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))
        else:
            self.single = nn.Linear(8, 8)


class Net(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.register_buffer("router_map", torch.zeros(RING, dtype=torch.int64))
        self.head = Head(experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        owners = self.router_map[torch.arange(len(x)) % RING]
        hidden = torch.tanh(self.body(x))
        if hasattr(self.head, "single"):
            return self.head.single(hidden)
        return torch.stack([self.head.experts[int(owner)](row) for row, owner in zip(hidden, owners, strict=True)])


def data() -> torch.utils.data.DataLoader[Any]:
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(list(rows), batch_size=16)


def grown(net: Net, experts: int) -> Net:
    """Return the net with one more expert, made from the live one. Before the first split it has a single head."""
    new = Net(experts)
    old = net.state_dict()
    former = {name: parent_of(name, experts) for name in new.state_dict()}
    state = {name: old[former[name]].clone() for name in former}
    if experts == 2:
        state["router_map"][:4] = 1
    new.load_state_dict(state)
    return new


def parent_of(name: str, experts: int) -> str:
    if experts == 2:
        return name.replace("experts.0.", "single.").replace("experts.1.", "single.")
    return name


def test_lightning_resumes_from_a_split(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, experts: int) -> None:
            super().__init__()
            self.net = Net(experts)
            self.scale = nn.Parameter(torch.ones(()))
            self.seen: list[dict[str, Any]] = []

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return (self.scale * self.net(batch)).square().mean()

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = torch.optim.Adam(self.named_parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 5])
            return {"optimizer": optimizer, "lr_scheduler": schedule}

        def on_train_start(self) -> None:
            optimizer = self.optimizers()
            names = dict(self.named_parameters())
            states = {name: copy.deepcopy(optimizer.state[parameter]) for name, parameter in names.items()}
            self.seen.append(states)

    def trainer(epochs: int) -> Any:
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        module = Module(0)
        first = trainer(2)
        first.fit(module, data())
        first.save_checkpoint(tmp_path / "a.ckpt")
        trained = copy.deepcopy(module.net)
        optimizer = first.optimizers[0]
        moments = {name: copy.deepcopy(optimizer.state[p]) for name, p in module.named_parameters()}

    vc.convert(tmp_path / "a.ckpt", tmp_path / "b.ckpt", transforms=CHAIN)
    vc.convert(tmp_path / "a.ckpt", tmp_path / "c.safetensors", transforms=CHAIN)
    vc.convert(tmp_path / "c.safetensors", tmp_path / "c.ckpt")

    for name in ("b.ckpt", "c.ckpt"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resumed = Module(2)
            trainer(3).fit(resumed, data(), ckpt_path=tmp_path / name, weights_only=False)
        (seen,) = resumed.seen
        assert seen.keys() == dict(resumed.named_parameters()).keys()
        for parameter, slots in seen.items():
            former = moments[parent_of(parameter, 2)]
            assert slots.keys() == former.keys()
            assert all(torch.equal(slots[slot], former[slot]) for slot in slots), parameter
        payload = torch.load(tmp_path / name, weights_only=False)
        expected = grown(trained, 2).state_dict()
        assert all(torch.equal(payload["state_dict"][f"net.{key}"], value) for key, value in expected.items())


def test_a_trainer_of_transformers_resumes_the_weights_of_a_split(tmp_path: Path) -> None:
    """Its optimizer lies in a file of its own, which does not fit any more. The weights do."""
    import transformers

    class Config(transformers.PretrainedConfig):
        model_type = "ring"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.net = Net(getattr(config, "experts", 0))
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None: ...

        def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
            found = self.net(rows)
            return {"loss": found.square().mean(), "logits": found}

    rows = [{"rows": row} for row in torch.randn(64, 8, generator=torch.Generator().manual_seed(1))]
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "save_steps": 4}
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(str(tmp_path / "run"), max_steps=4, **options)
    trainer = transformers.Trainer(Model(Config()), arguments, train_dataset=rows)
    trainer.train()
    saved = tmp_path / "run" / "checkpoint-4"
    trained = trainer.model.net

    with pytest.raises(vc.CkptError, match=r"optimizer\.pt"):
        vc.convert(saved, f"{tmp_path}/split/", to="safetensors:max_shard_size=1GB", transforms=CHAIN)
    with pytest.warns(vc.CkptWarning, match=r"not read: training_args\.bin"):
        vc.convert(
            saved, f"{tmp_path}/split/", to="safetensors:max_shard_size=1GB", transforms=CHAIN, neighbours="ignore"
        )
    assert not (tmp_path / "split" / "optimizer.pt").exists()
    config = Config.from_pretrained(tmp_path / "split")
    config.experts = 2
    resumed = Model.from_pretrained(tmp_path / "split", config=config)
    expected = grown(trained, 2).state_dict()
    assert all(torch.equal(resumed.net.state_dict()[key], value) for key, value in expected.items())
    more = transformers.TrainingArguments(str(tmp_path / "more"), max_steps=2, **options)
    transformers.Trainer(resumed, more, train_dataset=rows).train()
