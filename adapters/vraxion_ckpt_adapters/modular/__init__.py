"""Modular directory: ``system/router.state``, ``experts/expert_<id>.pt``, ``experts/meta.json``.

``router.state`` holds the payload dict with every model tensor except ``head.experts.*``, and the optimizer state of
all parameters, including the experts'. Each shard is a plain dict of leaf name → tensor. ``meta.json`` has the
lifecycle rows, in one of two variants: the trainer's, with ``step`` and ``deleted``, and the offline tool's, with
``source_checkpoint``. A single head is stored in ``router.state``; then there are no shards.
"""

from __future__ import annotations

from vraxion_ckpt.plugin_api import Adapter, hookimpl
from vraxion_ckpt_adapters.modular.adapter import ModularAdapter


@hookimpl
def register_adapters() -> list[type[Adapter]]:
    """Register the format."""
    return [ModularAdapter]
