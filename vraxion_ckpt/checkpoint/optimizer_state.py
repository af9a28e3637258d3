"""An optimizer's state: by parameter name, or by number as torch writes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vraxion_ckpt.checkpoint.order_rules import Rule
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict, TensorDictField


@dataclass
class ParamGroup:
    """One optimizer param group with its parameters by name.

    Attributes:
        options: learning rate and all other entries of the group except ``params`` and ``param_names``.
        params: parameter names, in optimizer order.
        keys: the keys of the group in file order. ``param_names`` is written only if it is among them.
    """

    options: dict[str, Any]
    params: list[str]
    keys: tuple[str, ...] = ()


@dataclass
class Optimizer:
    """An optimizer's state by parameter name instead of by position.

    Attributes:
        groups: the param groups, in order.
        state: the slots (``exp_avg``, ``momentum_buffer``, ``step``, …) of every parameter that has any. Any dict that
            is assigned becomes a `TensorDict`. The same holds for `extra`.
        extra: all other entries of the optimizer's state dict.
        bound_by: how the names were found and which assumptions were made, as text for users.
        undecided: names that may belong to another id, or to no id. Their state keeps its position. A chain that
            changes one of these parameters is refused.
        rules: the rules that explain the order of the parameters, or None if not computed yet.
        prefixes: prefix of all names in the file's param groups, and prefix of the same names in the model, for
            example ``("module.", "")`` for an optimizer of a wrapped model.
    """

    groups: list[ParamGroup]
    state: TensorDictField[dict[str, Any]] = TensorDictField()
    extra: TensorDictField[Any] = TensorDictField(required=False)
    bound_by: str = "names"
    undecided: frozenset[str] = frozenset()
    rules: tuple[Rule, ...] | None = None
    prefixes: tuple[str, str] = ("", "")

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():  # a pickle has plain dicts
            setattr(self, name, value)

    @property
    def params(self) -> list[str]:
        """All parameter names, group after group: the order of the ids in the file."""
        return [name for group in self.groups for name in group.params]

    def copy(self) -> Optimizer:
        """Return an optimizer with its own lists and dicts. The values of slots are shared."""
        return replace(
            self,
            groups=[replace(g, options=dict(g.options), params=list(g.params)) for g in self.groups],
            state=TensorDict({name: dict(slots) for name, slots in self.state.references().items()}),
            extra=TensorDict(self.extra),
        )


@dataclass(frozen=True)
class UnboundOptimizer:
    """An optimizer as torch writes it, with numbered parameters.

    Attributes:
        state_dict: the value that ``Optimizer.state_dict()`` returned.
        names: the parameter names in optimizer order, if an earlier conversion recorded them.
        digest: digest of the state for which `names` was recorded, see `vraxion_ckpt.checkpoint.torch_optimizer`.
        undecided: those of `names` that were undecided when they were recorded, see `Optimizer`.
    """

    state_dict: dict[str, Any]
    names: tuple[str, ...] | None = None
    digest: str | None = None
    undecided: frozenset[str] = frozenset()
