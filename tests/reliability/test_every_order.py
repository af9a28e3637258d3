"""The resume proof for optimizers in every order, in every format and in place, and for experts of two layers."""

from __future__ import annotations

import pytest
from test_optimizer_order import for_every_trainer, table_row

VEHICLES = {"one layer": ["modular", "safetensors", "edit"], "two layers": ["pt"]}


@pytest.mark.parametrize("layers", VEHICLES)
@for_every_trainer
def test_every_order_is_resumed_rightly_or_refused(order, grouping, counts, layers, tmp_path, figure):
    layered = layers == "two layers"
    figure(20, table_row(order, grouping, counts, layered, VEHICLES[layers], tmp_path))
