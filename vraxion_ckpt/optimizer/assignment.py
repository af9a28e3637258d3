"""Which optimizer ids may belong to which parameter names, by their shapes, with or without an order.

torch numbers parameters and keeps no names. The slots of an id tell the shape of its parameter. A name may be left
over: it is then a buffer, or a parameter that the optimizer does not train.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from vraxion_ckpt.checkpoint.torch_optimizer import Shape
from vraxion_ckpt.errors import BindingError
from vraxion_ckpt.wording import count

# The shapes of the ids of each param group; None where the state of an id does not tell.
GroupShapes = Sequence[Sequence[tuple[int, Shape | None]]]
Candidates = Sequence[tuple[str, Shape | None]]

WAYS_OUT = (
    "give the names (--param-names FILE: one name a line, in optimizer order), say how the optimizer was built "
    "(--optimizer-order model|sorted|reversed), leave it behind (--optimizer drop), or save with names (build the "
    "optimizer from model.named_parameters())"
)
_MOST_STATES = 400_000  # partial assignments to look at before giving up
_SKIP = -1  # the name belongs to no id

# A partial assignment: how many ids of each group have a name already.
_State = tuple[int, ...]


@dataclass(frozen=True)
class Assignment:
    """One assignment of names to ids that fits, and what others that fit as well would change.

    Attributes:
        names: one for each id, through the groups.
        undecided: names that belong to another id, or to none, in another assignment that fits as well.
    """

    names: list[str]
    undecided: frozenset[str] = frozenset()


def in_order(groups: GroupShapes, names: Candidates) -> Assignment:
    """Assign names to ids where every group lists its parameters in the order of `names`.

    Between groups nothing is assumed: ids of different groups may interleave. Works through the names in order; a
    state is how far each group has come. The first pass finds the states that can be reached, the second those from
    which all ids still get a name.

    Raises:
        BindingError: no assignment fits.
    """
    end = tuple(map(len, groups))
    total = sum(end)
    _refuse_too_few(total, names)
    layers: list[set[_State]] = [{tuple(0 for _ in groups)}]
    seen = 0
    for place, (_, shape) in enumerate(names):
        left = len(names) - place - 1
        reached = {
            after for state in layers[-1] for _, after in _moves(groups, state, shape) if total - sum(after) <= left
        }
        seen += len(reached)
        if seen > _MOST_STATES:
            raise BindingError("too many possible assignments of optimizer ids to names", hint=WAYS_OUT)
        layers.append(reached)
    useful: list[set[_State]] = [set() for _ in layers[:-1]] + [{end} & layers[-1]]
    for place in range(len(names) - 1, -1, -1):
        shape = names[place][1]
        useful[place] = {
            state
            for state in layers[place]
            if any(after in useful[place + 1] for _, after in _moves(groups, state, shape))
        }
    if not useful[0]:
        raise BindingError(explain_none(groups, names), hint=WAYS_OUT)
    undecided = set()
    found: list[list[str]] = [[] for _ in groups]
    chosen = next(iter(useful[0]))
    for place, (name, shape) in enumerate(names):
        options = {
            (number, state[number] if number != _SKIP else 0)
            for state in useful[place]
            for number, after in _moves(groups, state, shape)
            if after in useful[place + 1]
        }
        if len(options) > 1:
            undecided.add(name)
        number, chosen = next(
            (number, after) for number, after in _moves(groups, chosen, shape) if after in useful[place + 1]
        )
        if number != _SKIP:
            found[number].append(name)
    return Assignment([name for group in found for name in group], frozenset(undecided))


def by_shape(groups: GroupShapes, names: Candidates) -> Assignment:
    """Assign names to ids by their shapes alone, in whatever order the ids stand.

    Raises:
        BindingError: no assignment fits.
    """
    shapes = [shape for group in groups for _, shape in group]
    _refuse_too_few(len(shapes), names)
    wanted, offered = Counter(shapes), Counter(shape for _, shape in names)
    free_ids, free_names = wanted.pop(None, 0), offered.pop(None, 0)
    lacking = sum(max(0, count - offered[shape]) for shape, count in wanted.items())
    if lacking > free_names:
        raise BindingError(explain_none(groups, names), hint=WAYS_OUT)
    by_shapes: dict[Shape | None, list[str]] = {}
    for name, shape in reversed(names):
        by_shapes.setdefault(shape, []).append(name)
    # An id of a known shape gets a name of that shape, or one of an unknown shape; the others get what is left.
    given = [(by_shapes.get(s) or by_shapes[None]).pop() if s is not None else None for s in shapes]
    taken = set(given)
    rest = iter([name for name, _ in names if name not in taken])
    left_over = len(names) - (len(shapes) - free_ids)
    decided = set()
    if not free_names:
        for name, shape in names:
            ids, alike = wanted[shape], offered[shape]
            if (ids == alike == 1) or (ids == 0 and (free_ids == 0 or free_ids == left_over == 1)):
                decided.add(name)
    return Assignment(
        [name if name is not None else next(rest) for name in given],
        frozenset(name for name, _ in names if name not in decided),
    )


def _moves(groups: GroupShapes, state: _State, shape: Shape | None) -> Iterable[tuple[int, _State]]:
    """Yield what may become of the next name: it gets the next id of a group that fits, or none."""
    for number, done in enumerate(state):
        if done < len(groups[number]):
            wanted = groups[number][done][1]
            if wanted is None or shape is None or wanted == shape:
                yield number, (*state[:number], done + 1, *state[number + 1 :])
    yield _SKIP, state


def _refuse_too_few(total: int, names: Candidates) -> None:
    if total > len(names):
        raise BindingError(
            f"the optimizer has {count(total, 'parameter')}, "
            f"the model only {count(len(names), 'tensor')} that can be one",
            hint=WAYS_OUT,
        )


def explain_none(groups: GroupShapes, names: Candidates) -> str:
    """Say why no assignment fits."""
    available = {shape for _, shape in names}
    strangers = ((i, shape) for group in groups for i, shape in group if shape and shape not in available)
    for i, shape in islice(strangers, 1):
        return f"no assignment of optimizer ids fits: no tensor has the shape {list(shape)} of id {i}"
    return "no assignment of optimizer ids to the model's tensors fits their shapes and the order"
