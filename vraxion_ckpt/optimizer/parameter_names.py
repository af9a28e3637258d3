"""Lists of parameter names: wrapper prefixes and consistency checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vraxion_ckpt.checkpoint.head import Head
from vraxion_ckpt.checkpoint.head_names import split_name
from vraxion_ckpt.checkpoint.torch_optimizer import RawOptimizer
from vraxion_ckpt.errors import BindingError, InconsistentError
from vraxion_ckpt.optimizer.assignment import WAYS_OUT


def names_in_payload(value: Any) -> tuple[str, ...] | None:
    """Return a payload's ``param_names`` as a tuple, or None if the payload has none.

    Raises:
        InconsistentError: the value is not a list of strings.
    """
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InconsistentError("must be a list of strings", key="param_names")
    return tuple(value)


def names_in_groups(raw: RawOptimizer) -> list[str]:
    """Return the ``param_names`` of all param groups, group after group."""
    return [name for group in raw.groups for name in group.get("param_names", ())]


def common_prefixes(listed: Sequence[str], core: Mapping[str, Any], head: Head | None) -> tuple[str, str]:
    """Return the prefix that only the listed names have, and the prefix that only the model's names have.

    Wrappers add a prefix to all names (``module.``, ``_orig_mod.``) of the optimizer or of the state dict. An optimizer
    of a part of the model lacks that part's prefix. Both results are empty if the listed names are the model's, or if
    no prefix makes them equal, or several do.

    Args:
        listed: parameter names.
        core: the model's tensors outside the head, by name.
        head: the model's head.
    """

    def known(names: Sequence[str]) -> bool:
        return all(name in core or (head is not None and _may_be_in_head(name, head)) for name in names)

    if not listed or known(listed):
        return "", ""
    first = listed[0]
    for end in [i + 1 for i, char in enumerate(first) if char == "."]:
        prefix = first[:end]
        if all(name.startswith(prefix) for name in listed) and known([name[end:] for name in listed]):
            return prefix, ""
    models = {name[: -len(first)] for name in core if name.endswith(f".{first}")}
    for container in (head.names.single, head.names.experts) if head is not None else ():
        models |= {container[: i + 1] for i, char in enumerate(container) if char == "."}
    fitting = [prefix for prefix in models if known([prefix + each for each in listed])]
    return ("", fitting[0]) if len(fitting) == 1 else ("", "")


def in_model(name: str, prefixes: tuple[str, str]) -> str:
    """Return the name that a listed parameter has in the model, given the result of `common_prefixes`."""
    theirs, models = prefixes
    return models + name.removeprefix(theirs) if name.startswith(theirs) else name


def _may_be_in_head(name: str, head: Head) -> bool:
    if head.is_not_loaded(name):
        return True
    found = split_name(name, head.names)
    expert = head.experts.get(found[0]) if found else None
    return found is not None and expert is not None and name == head.prefix(found[0]) + found[1] and found[1] in expert


def check_groups_named(raw: RawOptimizer) -> None:
    """Raise `BindingError` if some param groups name their parameters and others do not."""
    named = [group.get("param_names") is not None for group in raw.groups if group["params"]]
    if any(named) and not all(named):
        raise BindingError("only some of the param groups name their parameters", hint=WAYS_OUT)


def check_count(raw: RawOptimizer, names: Sequence[str], whose: str) -> None:
    """Raise `BindingError` unless there is one name for each parameter of the optimizer and all names differ.

    Args:
        raw: the optimizer.
        names: the names to check.
        whose: what the names are, as a plural noun for messages.
    """
    if len(names) != len(raw.ids):
        raise BindingError(
            f"the number of names differs from that of parameters: {len(names)} in {whose}, "
            f"{len(raw.ids)} in the optimizer",
            hint=WAYS_OUT,
        )
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str):
            raise BindingError(f"{whose} contain {name!r}, which is not a string", hint=WAYS_OUT)
        if name in seen:
            raise BindingError(f"{whose} contain {name!r} twice", hint=WAYS_OUT)
        seen.add(name)
