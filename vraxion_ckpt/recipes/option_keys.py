"""The recipe keys that correspond to command-line options. Does not import torch."""

from __future__ import annotations

RECIPE_KEYS = {
    "--allow-global": "source.allow_globals",
    "--companions": "companions",
    "--from": "source.from",
    "--losses": "losses",
    "--manifest": "manifest",
    "--optimizer": "source.optimizer",
    "--optimizer-order": "source.optimizer_order",
    "--param-names": "source.param_names",
    "--result-order": "result_order",
    "--to": "targets.to",
    "--transform": "chain",
    "-t": "chain",
}
