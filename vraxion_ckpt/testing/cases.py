"""Say which plugin, options and sample a failing test was about."""

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
    """Add the plugin's name, its options and the sample, as a note, to whatever the block raises.

    Args:
        name: of the adapter or transform.
        options: as they were given.
        sample: the name of the checkpoint in `samples()`, or None for another checkpoint.
    """
    try:
        yield
    except BaseException as error:  # a failure of pytest is no Exception
        given = ", ".join(f"{option}={value!r}" for option, value in options.items()) or "none"
        error.add_note(f"plugin: {name}, options: {given}" + (f", sample: {sample}" if sample else ""))
        raise


def named(test: _F) -> _F:
    """Make a test of `AdapterTests` a `case` of its adapter, and of its parameter ``sample`` if it has one."""

    @functools.wraps(test)
    def run(self: Any, *args: Any, **fixtures: Any) -> None:
        __tracebackhide__ = True
        adapter: Adapter = self.adapter
        with case(adapter.name, dict(adapter), fixtures.get("sample")):
            test(self, *args, **fixtures)

    return run  # type: ignore[return-value]


def assert_none(found: Iterable[object], what: str) -> None:
    """Fail if anything is found, and list it.

    Raises:
        AssertionError: `what`, and the first twenty things that were found.
    """
    listed = list(found)
    more = [f"and {len(listed) - _MOST_SHOWN} more"] if listed[_MOST_SHOWN:] else []
    assert not listed, "\n  ".join([f"{what}:", *map(str, listed[:_MOST_SHOWN]), *more])
