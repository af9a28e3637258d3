"""Conformance suites for plugins, and checkpoints to test with; ``pip install vraxion-ckpt[testing]``.

A test module of a plugin subclasses `AdapterTests` or `TransformTests` in a few lines, and pytest runs the inherited
tests. The built-in plugins are tested in the same way. `make` and `samples` return checkpoints; `checkpoints` generates
them with hypothesis.
"""

from vraxion_ckpt.testing.adapters import AdapterTests
from vraxion_ckpt.testing.samples import RING, make, samples
from vraxion_ckpt.testing.strategies import DTYPES, checkpoints, plain_values, tensors
from vraxion_ckpt.testing.transforms import TransformTests
from vraxion_ckpt.testing.watch import untouched

__all__ = [
    "DTYPES",
    "RING",
    "AdapterTests",
    "TransformTests",
    "checkpoints",
    "make",
    "plain_values",
    "samples",
    "tensors",
    "untouched",
]
