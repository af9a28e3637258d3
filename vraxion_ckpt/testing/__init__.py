"""Conformance suites for plugins, with checkpoints to test them on; ``pip install vraxion-ckpt[testing]``.

Whoever writes an adapter or a transform subclasses `AdapterTests` or `TransformTests` in a test module, in a few
lines, and pytest runs what every plugin must do; the built-in ones are tested so too. `samples` and `make` give
checkpoints by hand, `checkpoints` generates them for hypothesis.
"""

from vraxion_ckpt.testing.adapters import AdapterTests
from vraxion_ckpt.testing.samples import DTYPES, RING, checkpoints, make, plain_values, samples, tensors
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
