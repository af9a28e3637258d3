"""Assign optimizer ids to parameter names by shape, with or without a known order.

torch numbers parameters and stores no names. The slots of an id determine the shape of its parameter. A name without an
id is a buffer, or a parameter that the optimizer does not train.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from vraxion_ckpt.checkpoint.torch_optimizer import Shape
from vraxion_ckpt.errors import BindingError
from vraxion_ckpt.wording import count

# Ids of each param group, with the shape of the parameter, or None if the state does not determine it.
GroupShapes = Sequence[Sequence[tuple[int, Shape | None]]]
Candidates = Sequence[tuple[str, Shape | None]]

WAYS_OUT = (
    "list the names (--param-names FILE: one name per line, in optimizer order), state how the optimizer was built "
    "(--optimizer-order model|sorted|reversed), drop it (--optimizer drop), or save a checkpoint with names (build the "
    "optimizer from model.named_parameters())"
)
_MOST_STATES = 400_000  # limit of partial assignments to examine
_SKIP = -1  # the name has no id

# A partial assignment: the number of ids of each group that have a name.
_State = tuple[int, ...]


@dataclass(frozen=True)
class Assignment:
    """An assignment of names to ids that fits, and the names to which other fitting assignments give other ids.

    Attributes:
        names: the name of each id, group after group.
        undecided: names that belong to another id, or to none, in another fitting assignment.
    """

    names: list[str]
    undecided: frozenset[str] = frozenset()


def in_order(groups: GroupShapes, names: Candidates) -> Assignment:
    """Assign names to ids, given that every group lists its parameters in the order of `names`.

    Names of different groups may alternate in `names`. A state is the number of ids of each group that have a name.
    Each name leads from one state to the next. Every path from the first state to the last one is an assignment that
    fits.

    Raises:
        BindingError: no assignment fits, or there are too many to examine.
    """
    _refuse_too_few(sum(map(len, groups)), names)
    layers = _states_on_paths(groups, names)
    if not layers[0]:
        raise BindingError(explain_none(groups, names), hint=WAYS_OUT)
    undecided = set()
    found: list[list[str]] = [[] for _ in groups]
    (chosen,) = layers[0]
    for (name, shape), states, following in zip(names, layers, layers[1:], strict=False):
        options = {
            (number, state[number] if number != _SKIP else 0)
            for state in states
            for number, after in _moves(groups, state, shape)
            if after in following
        }
        if len(options) > 1:
            undecided.add(name)
        number, chosen = next(move for move in _moves(groups, chosen, shape) if move[1] in following)
        if number != _SKIP:
            found[number].append(name)
    return Assignment([name for group in found for name in group], frozenset(undecided))


def _states_on_paths(groups: GroupShapes, names: Candidates) -> list[set[_State]]:
    """Return the possible states before each name and after the last one, if every id is to get a name."""
    end = tuple(map(len, groups))
    layers: list[set[_State]] = [{tuple(0 for _ in groups)}]
    seen = 0
    for left, (_, shape) in zip(range(len(names) - 1, -1, -1), names, strict=True):
        moves = (after for state in layers[-1] for _, after in _moves(groups, state, shape))
        layers.append({after for after in moves if sum(end) - sum(after) <= left})
        seen += len(layers[-1])
        if seen > _MOST_STATES:
            raise BindingError("there are too many possible assignments of optimizer ids to names", hint=WAYS_OUT)
    layers[-1] &= {end}
    for place in range(len(names) - 1, -1, -1):
        shape, following = names[place][1], layers[place + 1]
        layers[place] = {
            state for state in layers[place] if any(after in following for _, after in _moves(groups, state, shape))
        }
    return layers


def by_shape(groups: GroupShapes, names: Candidates) -> Assignment:
    """Assign names to ids by shape alone, for ids in any order.

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
    # An id of known shape gets a name of that shape, or of unknown shape. The other ids get the remaining names.
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
    """Yield each choice for the next name, a group whose next id fits or `_SKIP`, and the state after the choice."""
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
            f"but the model has only {count(len(names), 'tensor')} that can be parameters",
            hint=WAYS_OUT,
        )


def explain_none(groups: GroupShapes, names: Candidates) -> str:
    """Return a message that explains why no assignment fits."""
    available = {shape for _, shape in names}
    strangers = ((i, shape) for group in groups for i, shape in group if shape and shape not in available)
    for i, shape in islice(strangers, 1):
        return f"the optimizer does not fit the model: no tensor has shape {list(shape)}, which optimizer id {i} needs"
    return "the optimizer does not fit the model: no assignment of ids to tensors fits the shapes and the order"
