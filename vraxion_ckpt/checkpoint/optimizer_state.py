"""The state of a checkpoint's optimizers: by parameter name, or by number as torch writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from vraxion_ckpt.checkpoint.order_rules import Rule
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict, TensorDictField


class OptimizerForm(StrEnum):
    """How a file identifies the parameters of an optimizer.

    NUMBERED: by number, as ``torch.optim.Optimizer.state_dict()`` does. torch loads it by position.
    NESTED: by name, in ``state`` and in the groups' ``params``, as
    ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`` does. torch loads it by name.
    FLATTENED: by name, in keys ``state.<name>.<slot>`` and ``param_groups.<name>.<option>``, as the same function with
    ``StateDictOptions(flatten_optimizer_state_dict=True)`` does. torch loads it by name.
    """

    NUMBERED = "numbered"
    NESTED = "nested"
    FLATTENED = "flattened"


@dataclass(frozen=True)
class OptimizerPart:
    """One of the optimizers of a checkpoint: where the file has it, and in which form.

    Attributes:
        place: the keys under which the payload holds it, where `Checkpoint.payload` has None. Empty for the optimizer
            under the key that is usual in the format, which is not in `Checkpoint.payload`.
        form: how the file identifies parameters.
        prefixes: prefix of all names in the file, and prefix of the same names in the model, for example
            ``("module.", "")`` for an optimizer of a wrapped model.
        listed: for a form by name whose groups also have ``param_names``: the prefix that only these have, and the one
            that they lack. None without ``param_names``.
        keys: the keys of the file's dict in order, if that is not the usual order.
        rules: the rules that explain the order of the parameters, or None if not computed yet.
    """

    place: tuple[str | int, ...] = ()
    form: OptimizerForm = OptimizerForm.NUMBERED
    prefixes: tuple[str, str] = ("", "")
    listed: tuple[str, str] | None = None
    keys: tuple[str, ...] = ()
    rules: tuple[Rule, ...] | None = field(default=None, compare=False)

    @property
    def is_by_name(self) -> bool:
        """Whether torch loads it by name. Then the order of its parameters has no effect."""
        return self.form is not OptimizerForm.NUMBERED

    def in_file(self, name: str) -> str:
        """Return the name that the file has for a parameter of the model."""
        theirs, models = self.prefixes
        return theirs + name.removeprefix(models)

    @property
    def label(self) -> str:
        """The place as text. It is empty for the usual place."""
        return ".".join(map(str, self.place))

    def __str__(self) -> str:
        return self.label or "optimizer"


def is_only_usual(parts: Sequence[OptimizerPart]) -> bool:
    """Return whether a file has one optimizer, in the usual place and form, so that it is the trainer's."""
    return len(parts) == 1 and not parts[0].place and not parts[0].is_by_name


@dataclass
class ParamGroup:
    """One optimizer param group with its parameters by name.

    Attributes:
        options: learning rate and all other entries of the group except ``params`` and ``param_names``.
        params: parameter names, in optimizer order.
        keys: the keys of the group in file order. ``param_names`` is written only if it is among them.
        part: the index in `Optimizer.parts` of the optimizer to which the group belongs.
    """

    options: dict[str, Any]
    params: list[str]
    keys: tuple[str, ...] = ()
    part: int = 0


@dataclass
class Optimizer:
    """The state of all optimizers of a checkpoint, by parameter name instead of by position.

    No parameter is in two of them.

    Attributes:
        groups: the param groups, in order, those of one part after those of another.
        state: the slots (``exp_avg``, ``momentum_buffer``, ``step``, …) of every parameter that has any. Any dict that
            is assigned becomes a `TensorDict`. The same holds for `extra`.
        extra: all other entries of the optimizer's state dict. If there are several parts, a dict for each part that
            has any, by the part's label.
        bound_by: how the names were found and which assumptions were made, as text for users.
        undecided: names that may belong to another id, or to no id. Their state keeps its position. A chain that
            changes one of these parameters is refused.
        parts: the optimizers of the file.
    """

    groups: list[ParamGroup]
    state: TensorDictField[dict[str, Any]] = TensorDictField()
    extra: TensorDictField[Any] = TensorDictField(required=False)
    bound_by: str = "names"
    undecided: frozenset[str] = frozenset()
    parts: tuple[OptimizerPart, ...] = (OptimizerPart(),)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():  # a pickle has plain dicts
            setattr(self, name, value)

    @property
    def params(self) -> list[str]:
        """All parameter names, group after group: the order of the ids in the file."""
        return [name for group in self.groups for name in group.params]

    def of_part(self, number: int) -> Optimizer:
        """Return one part as an optimizer of its own. It shares its groups, and the state of all parts."""
        if len(self.parts) == 1:
            return self
        groups = [group for group in self.groups if group.part == number]
        return replace(self, groups=groups, extra=self.extra_of(number), parts=(self.parts[number],))

    def each_part(self) -> list[Optimizer]:
        """Return `of_part` for each part."""
        return [self.of_part(number) for number in range(len(self.parts))]

    def extra_of(self, number: int) -> TensorDict[str, Any]:
        """Return the entries of `extra` that belong to a part."""
        if len(self.parts) == 1:
            return self.extra
        label = self.parts[number].label
        return TensorDict(self.extra.reference(label) if label in self.extra else {})

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
    """The optimizers of a file as torch writes one, with numbered parameters.

    Attributes:
        state_dict: the value that ``Optimizer.state_dict()`` returned. For several optimizers, and for parameters
            identified by name, what it would return for an optimizer with the groups of all, with ``param_names``.
        names: the parameter names in optimizer order, if an earlier conversion recorded them.
        digest: digest of the state for which `names` was recorded, see `vraxion_ckpt.checkpoint.torch_optimizer`.
        undecided: those of `names` that were undecided when they were recorded, see `Optimizer`.
        parts: the optimizers. Prefixes are not known yet.
        part_of_group: the index in `parts` of each group; empty if there is one part.
    """

    state_dict: dict[str, Any]
    names: tuple[str, ...] | None = None
    digest: str | None = None
    undecided: frozenset[str] = frozenset()
    parts: tuple[OptimizerPart, ...] = (OptimizerPart(),)
    part_of_group: tuple[int, ...] = ()
