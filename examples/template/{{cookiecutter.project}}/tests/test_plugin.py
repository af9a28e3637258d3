"""Run the conformance suites on both plugins."""

from {{ cookiecutter.package }}.adapter import FormatAdapter
from {{ cookiecutter.package }}.transform import ExpertTransform

from vraxion_ckpt.testing import AdapterTests, TransformTests


class TestFormat(AdapterTests):
    adapter = FormatAdapter()


class TestTransform(TransformTests):
    transform = ExpertTransform
    accepted = (({"expert": 1, "factor": 0.5}, "experts"), ({"expert": "0"}, "single"))
    refused = (({"expert": 7}, "experts", "no expert 7"), ({"expert": 0}, "headless", "no expert 0"))
