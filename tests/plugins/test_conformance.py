"""The built-in plugins pass the suites that third parties subclass."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
from vraxion_ckpt_adapters.modular import ModularAdapter
from vraxion_ckpt_adapters.pt import PtAdapter
from vraxion_ckpt_adapters.safetensors import SafetensorsAdapter
from vraxion_ckpt_transforms.arc_meta import ArcMeta
from vraxion_ckpt_transforms.experts_to_single import ExpertsToSingle
from vraxion_ckpt_transforms.mitosis_split import MitosisSplit
from vraxion_ckpt_transforms.prune_merge import PruneMerge
from vraxion_ckpt_transforms.restore_hibernated import RestoreHibernated
from vraxion_ckpt_transforms.single_to_experts import SingleToExperts

from vraxion_ckpt.testing import RING, AdapterTests, TransformTests, make


class TestPt(AdapterTests):
    adapter = PtAdapter()


class TestModular(AdapterTests):
    adapter = ModularAdapter()


class TestSafetensors(AdapterTests):
    adapter = SafetensorsAdapter()


class TestSafetensorsShards(AdapterTests):
    adapter = SafetensorsAdapter(max_shard_size=300)


class TestSafetensorsWeightsOnly(AdapterTests):
    adapter = SafetensorsAdapter(weights_only=True)
    examples = 10


class TestSingleToExperts(TransformTests):
    transform = SingleToExperts
    accepted: ClassVar = [
        ({}, "single"),
        ({"experts": "3", "route": "modulo"}, "single"),
        ({"experts": 2, "noise": 0.01, "optimizer": "reset"}, "single"),
    ]
    refused: ClassVar = [({}, "experts", "already has 3 experts"), ({}, "headless", "has no head")]


class TestMitosisSplit(TransformTests):
    transform = MitosisSplit
    accepted: ClassVar = [
        ({"parent": 0, "addresses": "[0,3]", "noise": 0}, "experts"),
        ({"parent": 2, "addresses": [5]}, "layered_experts"),
        ({"parent": 0, "addresses": [0], "optimizer": "reset"}, "two_groups"),
    ]
    refused: ClassVar = [
        ({}, "experts", "there is no plan"),
        ({"parent": 0, "addresses": [1]}, "experts", "belongs to expert 1"),
        ({"parent": 0, "addresses": [0]}, "single", "the head is single"),
        ({"parent": 1, "addresses": [1]}, "deleted_expert", "was deleted"),
        ({"parent": 1, "addresses": [1]}, "hibernated", "all weights of expert 1 are zero"),
    ]


class TestPruneMerge(TransformTests):
    transform = PruneMerge
    accepted: ClassVar = [
        ({"merge_into": 0}, "experts"),
        ({"merge_from": "0", "merge_into": 2, "renumber": "true"}, "experts"),
        ({"merge_from": 1, "merge_into": 10, "renumber": True}, "many_experts"),
    ]
    refused: ClassVar = [
        ({"merge_from": 0, "merge_into": 1}, "experts", "renumber"),
        ({"merge_into": 0}, "single", "single"),
        ({"merge_into": 1}, "deleted_expert", "1"),
        ({"merge_into": 1}, "hibernated", "all weights of expert 1 are zero"),
    ]


class TestExpertsToSingle(TransformTests):
    transform = ExpertsToSingle
    accepted: ClassVar = [({}, "one_left")]
    refused: ClassVar = [({}, "experts", "weight"), ({}, "single", "single"), ({}, "headless", "head")]


@pytest.fixture(autouse=True, scope="module")
def visits(tmp_path_factory):
    path = tmp_path_factory.mktemp("visits") / "visits.json"
    path.write_text(json.dumps([1 + a % 5 for a in range(RING)]))
    TestArcMeta.accepted = [
        ({"visits": str(path), "arc_len": "4"}, "experts"),
        ({"visits": str(path), "parent": 1, "allow_empty_parent": "true"}, "head_first"),
    ]


class TestArcMeta(TransformTests):
    transform = ArcMeta
    refused: ClassVar = [({}, "experts", "visits")]


@pytest.fixture(autouse=True, scope="module")
def snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshots")
    for i in (0, 1):
        torch.save(dict(make(seed=5).head.experts[i]), folder / f"expert_{i}.pt")
    TestRestoreHibernated.accepted = [
        ({"snapshots": str(folder)}, "hibernated"),
        ({"snapshots": str(folder), "experts": "[0]", "replace": "true"}, "two_experts"),
    ]


@pytest.mark.filterwarnings("ignore:the weights of expert:vraxion_ckpt.errors.CkptWarning")
class TestRestoreHibernated(TransformTests):
    transform = RestoreHibernated
    refused: ClassVar = [
        ({"snapshots": "no/such/folder"}, "hibernated", "no such directory"),
        ({"snapshots": "."}, "hibernated", "no snapshot of expert 1"),
        ({"snapshots": "."}, "experts", "no expert whose weights are all zero"),
        ({"snapshots": "."}, "headless", "no head"),
    ]
