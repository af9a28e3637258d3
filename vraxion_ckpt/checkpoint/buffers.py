"""Recognise buffers of torch's own modules in a state dict by their names.

A state dict does not mark parameters and buffers. torch's modules use fixed buffer names and save several of them
together. A tensor counts as a buffer only if another tensor of the same module confirms it, because a parameter may
have the same name as a buffer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

# Leaf name of a buffer → leaf names of buffers that are saved with it. The same module must have at least one of them.
_COMPANION_LEAVES = {
    # torch.nn.modules.batchnorm: BatchNorm and InstanceNorm that track running statistics
    "running_mean": ("num_batches_tracked",),
    "running_var": ("num_batches_tracked",),
    "num_batches_tracked": ("running_mean", "running_var"),
    # torch.ao.quantization: observers and fake quantisation
    "min_val": ("max_val",),
    "max_val": ("min_val",),
    "histogram": ("min_val",),
    "eps": ("min_val", "fake_quant_enabled"),
    "scale": ("zero_point",),
    "zero_point": ("scale",),
    "fake_quant_enabled": ("observer_enabled",),
    "observer_enabled": ("fake_quant_enabled",),
}


def torch_buffers(names: Collection[str]) -> set[str]:
    """Return the names that are buffers of torch's own modules.

    Args:
        names: the dotted names of all tensors of a state dict or of a module.
    """
    known = names if isinstance(names, set | frozenset | dict) else set(names)
    return {name for name in known if any(other in known for other in _confirming_names(name))}


def _confirming_names(name: str) -> Iterator[str]:
    """Yield the names that confirm that `name` is a buffer. One of them in the state dict is enough."""
    module, dot, leaf = name.rpartition(".")
    for other in _COMPANION_LEAVES.get(leaf, ()):
        yield module + dot + other
    # torch.nn.utils.spectral_norm and torch.nn.utils.prune, which rename the parameter to <name>_orig
    for suffix in ("_u", "_v", "_mask"):
        if leaf.endswith(suffix):
            yield f"{module}{dot}{leaf.removesuffix(suffix)}_orig"
    # torch.nn.utils.parametrizations: `parametrizations.<name>.<i>.<buffer>` and `parametrizations.<name>.original`
    listed, _, number = module.rpartition(".")
    if number.isdecimal() and leaf in ("_u", "_v", "base") and listed.rpartition(".")[0].endswith("parametrizations"):
        yield f"{listed}.original"
