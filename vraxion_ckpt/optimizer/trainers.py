"""Which trainer has written a checkpoint: VRAXION's own build their optimizer in the model's order."""

from __future__ import annotations

from vraxion_ckpt.checkpoint.model import Checkpoint

_WALL_CLOCK_KEYS = frozenset({"ptr_inertia", "ptr_inertia_ema", "ptr_inertia_floor"})
# The step trainer's keys could be anybody's; together with the names of VRAXION's model they are its own.
_STEP_KEYS = frozenset({"step", "losses", "scaler"})
_MODEL_NAMES = frozenset(
    {"theta_ptr_reduced", "theta_gate_reduced", "context_logit", "router_map", "input_proj.weight"}
)


def known_trainer(checkpoint: Checkpoint) -> str | None:
    """Return the trainer that has written a checkpoint, in words; None if that cannot be told.

    Both of these call ``torch.optim.<Optimizer>(model.parameters())`` on a model whose state dict they save.
    """
    if checkpoint.payload.keys() >= _WALL_CLOCK_KEYS:
        return "VRAXION's wall-clock trainer"
    if checkpoint.payload.keys() >= _STEP_KEYS and checkpoint.core.keys() >= _MODEL_NAMES:
        return "VRAXION's step trainer"
    return None
