"""Run the conformance suites on both plugins, and test what the suites do not cover."""

import numpy as np
from vraxion_ckpt_npy.folder import NpyAdapter
from vraxion_ckpt_npy.hand_over import HandOver

from vraxion_ckpt.testing import AdapterTests, TransformTests, make


class TestNpy(AdapterTests):
    adapter = NpyAdapter()

    def test_numpy_alone_reads_the_tensors(self, tmp_path):
        path = self.written(make(), tmp_path)
        arrays = [np.load(file) for file in sorted(path.glob("*.npy"))]
        for tensor, array in zip(make().state_dict().values(), arrays, strict=False):
            assert np.array_equal(tensor.numpy(), array)


class TestHandOver(TransformTests):
    transform = HandOver
    accepted = (
        ({"addresses": "[0,3]", "to": 1}, "experts"),
        ({"addresses": [11], "to": "2"}, "layered_experts"),
    )
    refused = (
        ({"addresses": [12], "to": 1}, "experts", "0 to 11"),
        ({"addresses": [0], "to": 3}, "experts", "no expert 3"),
        ({"addresses": [0], "to": 1}, "deleted_expert", "no expert 1"),
        ({"addresses": [0], "to": 0}, "headless", "no experts"),
    )

    def test_the_addresses_have_their_new_owner(self):
        after = self.run({"addresses": [0, 1], "to": 2}, make())
        assert after.router_map.tolist() == [2, 2, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
