"""safetensors: one file, or a folder of shards with a Hugging Face index.

Model tensors keep their state-dict names, so any safetensors reader can use the file. Tensors of the optimizer and the
payload have names that begin with ``vraxion_ckpt/``. Everything that is not a tensor is JSON under the key
``vraxion_ckpt`` of ``__metadata__``, described in `vraxion_ckpt.formats.document`.

A folder of shards has ``model-00001-of-0000N.safetensors`` and ``model.safetensors.index.json``. The index has the
``weight_map`` (tensor → file) and the same JSON. Model tensors and training state are in separate shards. A file that
was written by other software is read as a state dict.
"""

from __future__ import annotations

from vraxion_ckpt.plugin_api import Adapter, hookimpl
from vraxion_ckpt_adapters.safetensors.adapter import SafetensorsAdapter


@hookimpl
def register_adapters() -> list[type[Adapter]]:
    """Register the format."""
    return [SafetensorsAdapter]
