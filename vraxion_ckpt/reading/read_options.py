"""The options for reading a checkpoint."""

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
    drop_keys: Sequence[str]


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a checkpoint: facts that its files do not contain, and permissions.

    Attributes:
        from_: the format; detected from the content if None.
        param_names: the name of every optimizer parameter, in optimizer order.
        optimizer_order: how the trainer orders the parameters of each param group.
        allow_globals: full names of classes that a pickle may use in addition to plain data.
        drop_keys: entries of the payload to leave out, as `inspect` spells them, such as ``scheduler.milestones``. They
            need not be readable.

    Raises:
        UsageError: a value has a wrong type or is unknown.
    """

    from_: AdapterLike | None = None
    param_names: Sequence[str] | None = None
    optimizer_order: OptimizerOrder | None = None
    allow_globals: Sequence[str] = ()
    drop_keys: Sequence[str] = ()

    @classmethod
    def of(cls, function: str, given: ReadKeywords) -> ReadOptions:
        """Return the options that a public function was given as keyword arguments.

        Raises:
            TypeError: a keyword is unknown, as Python raises it for a function without ``**`` arguments.
            UsageError: a value has a wrong type or is unknown.
        """
        if unknown := next((name for name in given if name not in cls.__dataclass_fields__), None):
            raise TypeError(f"{function}() got an unexpected keyword argument {unknown!r}")
        return cls(**given)

    def __post_init__(self) -> None:
        if self.optimizer_order not in (None, *get_args(OptimizerOrder)):
            known = ", ".join(get_args(OptimizerOrder))
            raise UsageError(f"optimizer_order={self.optimizer_order!r}: must be one of {known}")
        check_names(self.param_names, "param_names")
        check_names(self.allow_globals, "allow_globals")
        check_names(self.drop_keys, "drop_keys")


def check_names(names: Any, what: str) -> None:
    """Check that `names` is None or a list of strings. A single string would be read letter by letter.

    Raises:
        UsageError: it is neither.
    """
    if names is None:
        return
    listed = isinstance(names, Sequence) and not isinstance(names, str | bytes)
    if not listed or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{what} must be a list of names, not {names!r:.60}")
