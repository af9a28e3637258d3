"""The recipe keys that correspond to command-line options. Does not import torch."""

from __future__ import annotations

import re

RECIPE_KEYS = {
    "--allow-global": "source.allow_globals",
    "--companions": "companions",
    "--drop-key": "source.drop_keys",
    "--from": "source.from",
    "--losses": "losses",
    "--manifest": "manifest",
    "--neighbours": "neighbours",
    "--optimizer": "source.optimizer",
    "--optimizer-order": "source.optimizer_order",
    "--param-names": "source.param_names",
    "--result-order": "result_order",
    "--to": "targets.to",
    "--transform": "chain",
    "-t": "chain",
}


def keys_for(text: str) -> list[tuple[str, str]]:
    """Return the long options in a text that have a recipe key, each with the key, in the order of the text."""
    named = dict.fromkeys(re.findall(r"--[a-z-]+", text))
    return [(option, RECIPE_KEYS[option]) for option in named if option in RECIPE_KEYS]
