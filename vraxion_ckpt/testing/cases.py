"""Add the plugin's name, its options and the sample's name to failures of the conformance suites."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from vraxion_ckpt.plugins.adapter import Adapter

_F = TypeVar("_F", bound=Callable[..., None])

_MOST_SHOWN = 20


@contextmanager
def case(name: str, options: Mapping[str, Any], sample: str | None = None) -> Iterator[None]:
    """Add a note with the plugin, its options and the sample to any exception from the block.

    Args:
        name: name of the adapter or transform.
        options: the options of the adapter or transform, as given.
        sample: name of the checkpoint in `samples()`, or None if it is another checkpoint.
    """
    try:
        yield
    except BaseException as error:  # pytest's failures are not subclasses of Exception
        given = ", ".join(f"{option}={value!r}" for option, value in options.items()) or "none"
        error.add_note(f"plugin: {name}, options: {given}" + (f", sample: {sample}" if sample else ""))
        raise


def named(test: _F) -> _F:
    """Add the adapter, its options and the parameter ``sample``, if any, to failures of a test."""

    @functools.wraps(test)
    def run(self: Any, *args: Any, **fixtures: Any) -> None:
        __tracebackhide__ = True
        adapter: Adapter = self.adapter
        with case(adapter.name, dict(adapter), fixtures.get("sample")):
            test(self, *args, **fixtures)

    return run  # type: ignore[return-value]


def assert_none(found: Iterable[object], what: str) -> None:
    """Fail if `found` is not empty.

    Raises:
        AssertionError: `found` is not empty. The message has `what` and the first twenty items.
    """
    listed = list(found)
    more = [f"and {len(listed) - _MOST_SHOWN} more"] if listed[_MOST_SHOWN:] else []
    assert not listed, "\n  ".join([f"{what}:", *map(str, listed[:_MOST_SHOWN]), *more])
