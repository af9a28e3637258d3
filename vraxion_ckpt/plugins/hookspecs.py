"""The hooks that a plugin module may define, marked with `hookimpl`.

A plugin is a module that is listed in the entry-point group ``vraxion_ckpt``::

    [project.entry-points.vraxion_ckpt]
    scale = "my_package.scale"
"""

from __future__ import annotations

import pluggy

from vraxion_ckpt.checkpoint.dialects import Dialect
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.ring import Visits
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.plugins.transform import Transform

GROUP = "vraxion_ckpt"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def register_adapters() -> list[type[Adapter]]:
    """Return the adapter classes of this plugin."""
    raise NotImplementedError


@hookspec
def register_transforms() -> list[type[Transform]]:
    """Return the transform classes of this plugin."""
    raise NotImplementedError


@hookspec
def register_dialects() -> list[Dialect]:
    """Return the dialects of trainers that this plugin declares."""
    raise NotImplementedError


@hookspec(firstresult=True)
def probe_visits(checkpoint: Checkpoint) -> Visits | None:
    """Return how often each ring address is visited, for instance by running the model, or None if unknown."""
