"""Recognise checkpoints of VRAXION's trainers, which build their optimizer in the model's order."""

from __future__ import annotations

from vraxion_ckpt.checkpoint.model import Checkpoint

_WALL_CLOCK_KEYS = frozenset({"ptr_inertia", "ptr_inertia_ema", "ptr_inertia_floor"})
# Other trainers may use the step trainer's keys, so the model must also have the names of VRAXION's model.
_STEP_KEYS = frozenset({"step", "losses", "scaler"})
_MODEL_NAMES = frozenset(
    {"theta_ptr_reduced", "theta_gate_reduced", "context_logit", "router_map", "input_proj.weight"}
)


def known_trainer(checkpoint: Checkpoint) -> str | None:
    """Return the name of the trainer that wrote a checkpoint, or None if it is not recognised.

    The recognised trainers call ``torch.optim.<Optimizer>(model.parameters())`` and save the state dict of that model.
    """
    if checkpoint.payload.keys() >= _WALL_CLOCK_KEYS:
        return "VRAXION's wall-clock trainer"
    if checkpoint.payload.keys() >= _STEP_KEYS and checkpoint.core.keys() >= _MODEL_NAMES:
        return "VRAXION's step trainer"
    return None
