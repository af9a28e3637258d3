"""What a user states about a checkpoint that is to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, get_args

from vraxion_ckpt.errors import UsageError
from vraxion_ckpt.optimizer.inference import OptimizerOrder
from vraxion_ckpt.plugins.discovery import AdapterLike


class ReadKeywords(TypedDict, total=False):
    """The fields of `ReadOptions` as keyword arguments of the public functions."""

    from_: AdapterLike | None
    param_names: Sequence[str] | None
    optimizer_order: OptimizerOrder | None
    allow_globals: Sequence[str]


@dataclass(frozen=True)
class ReadOptions:
    """What a user states about a checkpoint, because its files do not tell or must not decide.

    Attributes:
        from_: its format; found from its content if not given.
        param_names: every optimizer parameter's name in optimizer order.
        optimizer_order: how its trainer orders the parameters of each param group.
        allow_globals: full names of classes that a pickle may use besides plain data.

    Raises:
        UsageError: a value that is none of these.
    """

    from_: AdapterLike | None = None
    param_names: Sequence[str] | None = None
    optimizer_order: OptimizerOrder | None = None
    allow_globals: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.optimizer_order not in (None, *get_args(OptimizerOrder)):
            known = ", ".join(get_args(OptimizerOrder))
            raise UsageError(f"optimizer_order={self.optimizer_order!r}: must be one of {known}")
        check_names(self.param_names, "param_names")
        check_names(self.allow_globals, "allow_globals")


def check_names(names: Any, what: str) -> None:
    """Refuse what is not a list of names. A text would be taken letter by letter."""
    if names is None:
        return
    listed = isinstance(names, Sequence) and not isinstance(names, str | bytes)
    if not listed or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{what} must be a list of names, not {names!r:.60}")
