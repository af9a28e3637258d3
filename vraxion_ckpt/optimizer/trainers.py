"""Recognise trainers that are known to build their optimizer in the model's order."""

from __future__ import annotations

from vraxion_ckpt.checkpoint.model import Checkpoint


def known_trainer(checkpoint: Checkpoint) -> str | None:
    """Return the name of the trainer that wrote a checkpoint, or None if no dialect declares its order.

    The recognised trainers call ``torch.optim.<Optimizer>(model.parameters())`` and save the state dict of that model.
    """
    prefix = checkpoint.head.names.prefix if checkpoint.head else ""
    for dialect in checkpoint.origin.known_dialects:
        if dialect.in_model_order and dialect.wrote(checkpoint.payload.keys(), checkpoint.core.keys(), prefix):
            return dialect.name
    return None
