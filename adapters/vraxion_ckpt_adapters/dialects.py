"""The dialects of trainers that are recognised: under which keys they keep the model and its optimizers.

Of the dialects that fit a file, the one that requires the most keys is used. A file is written back under the keys
under which it came. To declare a dialect of your own, return it from `register_dialects` of a plugin.
"""

from __future__ import annotations

from vraxion_ckpt.plugin_api import Dialect, hookimpl

_RING_MODEL = frozenset({"theta_ptr_reduced", "theta_gate_reduced", "context_logit", "router_map", "input_proj.weight"})

# Only these trainers are known to build their optimizer in the model's order. Others may use the keys of the step
# trainer, so its model must also have the names of VRAXION's model.
VRAXION = [
    Dialect(
        "VRAXION's wall-clock trainer",
        model_key="model",
        optimizer_keys=("optim",),
        requires=frozenset({"ptr_inertia", "ptr_inertia_ema", "ptr_inertia_floor"}),
        in_model_order=True,
    ),
    Dialect(
        "VRAXION's step trainer",
        model_key="model",
        optimizer_keys=("optimizer",),
        requires=frozenset({"step", "losses", "scaler"}),
        model_names=_RING_MODEL,
        in_model_order=True,
    ),
    Dialect("VRAXION's evolution", model_key="model", requires=frozenset({"gen", "train", "eval", "fitness"})),
]

OTHERS = [
    Dialect(
        "Lightning",
        model_key="state_dict",
        optimizer_keys=("optimizer_states",),
        requires=frozenset({"pytorch-lightning_version"}),
    ),
    Dialect(
        "PyTorch's own recipe",
        model_key="model_state_dict",
        optimizer_keys=("optimizer_state_dict",),
    ),
    Dialect("a training loop", model_key="model", optimizer_keys=("optim", "optimizer", "opt")),
    Dialect("a training loop", model_key="state_dict", optimizer_keys=("optimizer", "optim")),
    Dialect("a training loop", model_key="net", optimizer_keys=("optim", "optimizer")),
    Dialect("DeepSpeed", model_key="module", optimizer_keys=("optimizer",)),
]


@hookimpl
def register_dialects() -> list[Dialect]:
    """Register the dialects."""
    return [*VRAXION, *OTHERS]
