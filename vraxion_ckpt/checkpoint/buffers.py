"""Which tensors of a state dict are buffers of torch's own modules, told by the names that torch gives them.

A state dict does not say which of its tensors are parameters. torch's own modules name their buffers in a fixed way
and always save them together with others of the same module, which tells them from a parameter that happens to have
the same name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

# Leaf name of a buffer → leaf names of which one must stand in the same module.
_BESIDE = {
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
    """Return those of the names that torch's own modules give to buffers.

    Args:
        names: all tensors of a state dict, or of a module, by their dotted names.
    """
    known = names if isinstance(names, set | frozenset | dict) else set(names)
    return {name for name in known if any(other in known for other in _witnesses(name))}


def _witnesses(name: str) -> Iterator[str]:
    """Yield the names of which one must be there too for `name` to be a buffer of torch's."""
    module, dot, leaf = name.rpartition(".")
    for other in _BESIDE.get(leaf, ()):
        yield module + dot + other
    # torch.nn.utils.spectral_norm and torch.nn.utils.prune, which rename the parameter to <name>_orig
    for suffix in ("_u", "_v", "_mask"):
        if leaf.endswith(suffix):
            yield f"{module}{dot}{leaf.removesuffix(suffix)}_orig"
    # torch.nn.utils.parametrizations: `parametrizations.<name>.<i>.<buffer>` beside `parametrizations.<name>.original`
    listed, _, number = module.rpartition(".")
    if number.isdecimal() and leaf in ("_u", "_v", "base") and listed.rpartition(".")[0].endswith("parametrizations"):
        yield f"{listed}.original"
