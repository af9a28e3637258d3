"""Measure what goes wrong if a model grows and its optimizer's state does not.

Prints the two tables of docs/explanation/optimizer.md.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

STEPS, LEARNING_RATE = 2000, 1e-4
State = dict[str, torch.Tensor]


# --- the first update of a clone ---


def train(model: nn.Linear, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Fit labels of which a fifth are random, so that the gradient stays noisy."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 16, generator=generator, dtype=torch.float64)
        label = torch.where(torch.rand(32, generator=generator) < 0.2, torch.randint(4, (32,), generator=generator), 0)
        label = (x[:, :4].argmax(1) + label) % 4
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()


def first_update(parent: nn.Linear, state: State) -> float:
    """Return how far a clone's weights move in its first step: the mean, in learning rates."""
    moved = []
    for batch in range(STEPS, STEPS + 50):
        clone = copy.deepcopy(parent)
        optimizer = torch.optim.Adam([clone.weight], lr=LEARNING_RATE)
        if state:
            optimizer.state[clone.weight] = copy.deepcopy(state)
        train(clone, optimizer, range(batch, batch + 1))
        moved.append((clone.weight - parent.weight).abs().mean().item() / LEARNING_RATE)
    return sum(moved) / len(moved)


def print_first_updates() -> None:
    """Train a parent, clone it in each way, and print the clone's first step."""
    torch.manual_seed(0)
    parent = nn.Linear(16, 4, dtype=torch.float64)
    optimizer = torch.optim.Adam(parent.parameters(), lr=LEARNING_RATE)
    train(parent, optimizer, range(STEPS))
    copied = optimizer.state[parent.weight]
    zero = {slot: torch.zeros_like(value) for slot, value in copied.items()}
    ways = {
        "every slot copied (`optimizer=copy`)": copied,
        "no entry at all (`optimizer=reset`)": {},
        "moments zero, `step` zero": zero,
        f"moments zero, `step` kept at {STEPS}": {**zero, "step": copied["step"]},
        "moments copied, `step` zero": {**copied, "step": zero["step"]},
    }
    print("| the clone's state | first update, in learning rates |")
    print("|---|---|")
    for way, state in ways.items():
        print(f"| {way} | {first_update(parent, state):.2f} |")


# --- what torch does with mismatched state ---


def trained(*shapes: tuple[int, ...]) -> tuple[list[nn.Parameter], torch.optim.Adam]:
    """Return parameters and their Adam after a step; the gradient of the first is 1, of the second 2, ..."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = torch.optim.Adam(parameters)
    step(parameters, optimizer)
    return parameters, optimizer


def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Take a step."""
    for number, parameter in enumerate(parameters, 1):
        parameter.grad = torch.full_like(parameter, float(number))
    optimizer.step()


def outcome(attempt: Callable[[], object], otherwise: str) -> str:
    """Return the error that an attempt raises, or a text if it raises none."""
    try:
        attempt()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return otherwise


def added() -> tuple[str, str]:
    """Load the state of two parameters into an optimizer of three."""
    _, old = trained((3,), (3,))
    _, new = trained((3,), (3,), (3,))
    return outcome(lambda: new.load_state_dict(old.state_dict()), "loads"), "–"


def other_order() -> tuple[str, str]:
    """Load the state of two parameters, a and b, into an optimizer of b and a."""
    (a, b), old = trained((3,), (3,))
    new = torch.optim.Adam([b, a])
    loaded = outcome(lambda: new.load_state_dict(old.state_dict()), "loads without an error")
    whose = "the other's" if torch.equal(new.state[b]["exp_avg"], old.state[a]["exp_avg"]) else "its own"
    stepped = outcome(lambda: step([b, a], new), "steps without an error")
    return loaded, f"{stepped}, each parameter with {whose} moments"


def wrong_shape() -> tuple[str, str]:
    """Load the state of a parameter into an optimizer of one of another shape."""
    _, old = trained((3,))
    parameters, new = trained((4,))
    loaded = outcome(lambda: new.load_state_dict(old.state_dict()), "loads without an error")
    return loaded, outcome(lambda: step(parameters, new), "steps")


def shared() -> tuple[str, str]:
    """Share the parent's tensors with a clone's state, save, load, and take a step."""
    _, old = trained((3,))
    saved: dict[str, Any] = old.state_dict()
    saved["state"][1] = dict(saved["state"][0])
    saved["param_groups"][0]["params"] = [0, 1]
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    parameters, new = trained((3,), (3,))
    loaded = outcome(lambda: new.load_state_dict(torch.load(file)), "loads without an error")
    step(parameters, new)
    parent, child = (new.state[parameter] for parameter in parameters)
    one = parent["exp_avg"].data_ptr() == child["exp_avg"].data_ptr()
    counted = int(parent["step"]) - 1
    return loaded, f"counts {counted} steps instead of 1; {'both share one' if one else 'each has its own'} `exp_avg`"


def print_what_torch_does() -> None:
    """Print the outcome of loading and of the first step."""
    cases = {
        "one parameter fewer than the model": added,
        "as many parameters, in another order": other_order,
        "a parameter of another shape": wrong_shape,
        "a clone whose state shares storage with its parent's": shared,
    }
    print("| the state belongs to | `load_state_dict` | the first `step` |")
    print("|---|---|---|")
    for case, measure in cases.items():
        print(f"| {case} | {' | '.join(measure())} |")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are small
    print_first_updates()
    print()
    print_what_torch_does()
