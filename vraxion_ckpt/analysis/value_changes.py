"""Compare plain values and tensors of two checkpoints."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vraxion_ckpt.analysis.changes import Change
from vraxion_ckpt.analysis.measurement import measure
from vraxion_ckpt.checkpoint.comparison import differences, same_bits, unlike_entries
from vraxion_ckpt.checkpoint.plain_data import dtype_and_shape, in_fixed_order
from vraxion_ckpt.checkpoint.references import TensorRef, as_reference, is_tensor
from vraxion_ckpt.checkpoint.tensor_dict import SCALARS, TensorDict, resolved

# Maps the name of a tensor of the first checkpoint to its name in the second, or to None if it is not there.
NameMap = Callable[[str], str | None]


def tensor_change(before: str, after: str, a: TensorRef, b: TensorRef) -> Change | None:
    """Return the change from tensor `a` to `b`, or None if both are bit-identical and have the same name."""
    old, new = describe_value(a), describe_value(b)
    if same_bits(a, b):
        return None if before == after else Change(what="renamed", before=before, after=after, old=old, new=new)
    return Change(what="changed", before=before, after=after, old=old, new=new, measure=measure([(a, b)]))


def describe_value(value: Any) -> Any:
    """Return a tensor as dtype and shape, and a large value as its size."""
    if is_tensor(value):
        value = as_reference(value)
        kind = "parameter " if value.parameter else ""
        grad = "" if value.requires_grad == bool(kind) else " requires_grad" if value.requires_grad else " frozen"
        return f"{kind}{dtype_and_shape(value)}{grad}"
    if isinstance(value, Mapping) and len(value) > 4:
        return f"{len(value)} entries"
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"list of {len(value)}"
    return resolved(value)


def added(name: str, value: Any) -> Change:
    """Return the change for an entry of the second checkpoint only."""
    return Change(what="added", before=None, after=name, old=None, new=describe_value(value))


def removed(name: str, value: Any) -> Change:
    """Return the change for an entry of the first checkpoint only."""
    return Change(what="removed", before=name, after=None, old=describe_value(value), new=None)


def order_changes(a: Iterable[str], b: Iterable[str], names: NameMap, what: str) -> list[Change]:
    """Return a change if the names in both lists have another order."""
    former = [names(name) for name in a]
    both = set(former) & set(b)
    old, new = [name for name in former if name in both], [name for name in b if name in both]
    if old == new:
        return []
    at = next(i for i, (x, y) in enumerate(zip(old, new, strict=True)) if x != y)
    place = f"order of the {what}"
    return [Change(what="changed", before=place, after=place, old=f"{old[at]} at {at}", new=f"{new[at]} at {at}")]


def value_changes(a: Any, b: Any, place: str = "") -> Iterator[Change]:
    """Yield each difference inside two plain values."""
    a, b = (value.references() if isinstance(value, TensorDict) else value for value in (a, b))
    if isinstance(a, OrderedDict) and isinstance(b, OrderedDict) and (vars(a) or vars(b)):
        yield from value_changes(vars(a), vars(b), f"{place} attributes")
    if isinstance(a, Mapping) and type(a) is type(b):
        simple = {str}.issuperset(map(type, (*a, *b)))
        if not simple and _same(a, b):  # NaN is a key that is not found
            return
        changed = False
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{place}.{key}" if place else str(key)
            for change in entry_changes(a, b, key, inner, inner):
                changed = True
                yield change
        if not simple and not changed and not _same(in_fixed_order(a), in_fixed_order(b)):  # 1 and True are found
            yield Change(what="changed", before=place, after=place, old=repr([*a]), new=repr([*b]))
    elif is_tensor(a) and is_tensor(b):
        found = tensor_change(place, place, as_reference(a), as_reference(b))
        if found:
            yield found
    elif isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b) and not (_is_flat(a) and _is_flat(b)):
        for i, x, y in unlike_entries(a, b):
            yield from value_changes(x, y, f"{place}[{i}]")
    elif not _same(a, b):
        old, new = describe_value(a), describe_value(b)
        if type(a) is not type(b) and isinstance(old, str) and old == new:
            old, new = (f"{type(value).__name__}, {text}" for value, text in ((a, old), (b, new)))
        elif isinstance(a, list | tuple) and isinstance(old, str) and old == new:
            at = next(i for i, x, y in unlike_entries(a, b) if not _same(x, y))
            place, old, new = f"{place}[{at}] and perhaps more", a[at], b[at]
        yield Change(what="changed", before=place, after=place, old=old, new=new)


def entry_changes(a: Mapping[Any, Any], b: Mapping[Any, Any], key: Any, before: str, after: str) -> Iterator[Change]:
    """Yield each difference in the value of `key`; `before` and `after` are its names in the checkpoints."""
    if key not in b:
        yield removed(before, a[key])
    elif key not in a:
        yield added(after, b[key])
    else:
        for change in value_changes(a[key], b[key], after):
            name = None if change.before is None else before + change.before.removeprefix(after)
            yield change.model_copy(update={"before": name})


def _is_flat(values: Sequence[Any]) -> bool:
    return SCALARS.issuperset(map(type, values))


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    return not any(differences(a, b))
