"""Dialects: how trainers lay out the dict that they save. Declared as data by plugins. Imports without torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dialect:
    """The layout of the dict that a kind of trainer saves.

    Attributes:
        name: who writes it, for messages.
        model_key: the key of the model's state dict.
        optimizer_keys: the keys that may hold the optimizer.
        requires: further keys that every dict of this dialect has.
        model_names: names of tensors that every model of this trainer has, without the prefix of a wrapper.
        in_model_order: whether the trainer builds its optimizer from ``model.parameters()`` of the saved model.
    """

    name: str
    model_key: str
    optimizer_keys: tuple[str, ...] = ()
    requires: frozenset[str] = frozenset()
    model_names: frozenset[str] = frozenset()
    in_model_order: bool = False

    def fits(self, entries: Mapping[Any, Any]) -> bool:
        """Tell whether a saved dict has the keys of this dialect, and a dict as its model."""
        return isinstance(entries.get(self.model_key), dict) and self.requires <= entries.keys()

    def wrote(self, keys: Collection[Any], tensor_names: Collection[str], prefix: str) -> bool:
        """Tell whether the trainer of this dialect has written a checkpoint.

        Args:
            keys: the keys of the saved dict besides model and optimizer.
            tensor_names: names of the model's tensors outside the head.
            prefix: what a wrapper puts before these names.
        """
        return self.requires.issubset(keys) and all(prefix + name in tensor_names for name in self.model_names)


def most_specific(dialects: Collection[Dialect], entries: Mapping[Any, Any]) -> list[Dialect]:
    """Return the dialects that fit a saved dict and require the most keys. They may differ in the model's key."""
    fitting = [dialect for dialect in dialects if dialect.fits(entries)]
    most = max((len(dialect.requires) for dialect in fitting), default=0)
    return [dialect for dialect in fitting if len(dialect.requires) == most]
