"""Find adapters and transforms through entry points. The built-in ones are found in the same way.

A plugin that cannot be loaded is reported in a warning and skipped. If two plugins have the same name, looking up this
name is an error; every other name works.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from inspect import isabstract
from typing import Any, Generic, TypeVar

import pluggy

from vraxion_ckpt.checkpoint.dialects import Dialect
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.ring import Visits
from vraxion_ckpt.errors import CkptWarning, OptionError, PluginError, UsageError, raise_if_out_of_memory
from vraxion_ckpt.plugins import hookspecs
from vraxion_ckpt.plugins.adapter import Adapter, IncrementalDirectoryAdapter
from vraxion_ckpt.plugins.lent_tensors import counted_writes, wrote_into
from vraxion_ckpt.plugins.options import Plugin, configure, parse_call
from vraxion_ckpt.plugins.plugin_calls import (
    defect,
    distribution_of,
    in_words,
    is_fault_of_plugin,
    note_distribution,
    output_to_stderr,
    plugin_call,
)
from vraxion_ckpt.plugins.transform import Step, Transform
from vraxion_ckpt.wording import did_you_mean

_P = TypeVar("_P", bound=Plugin)

TransformLike = str | tuple[str, Mapping[str, Any]] | Transform
AdapterLike = str | tuple[str, Mapping[str, Any]] | Adapter


@dataclass(frozen=True)
class Registered(Generic[_P]):
    """An adapter or transform, and the entry point and distribution it comes from."""

    plugin: type[_P]
    entry_point: str
    distribution: str
    version: str


@dataclass(frozen=True)
class Broken:
    """An entry point that could not be loaded."""

    entry_point: str
    distribution: str
    reason: str


@dataclass(frozen=True)
class _EntryPoint:
    """An entry point in our group, and the name and version of its distribution."""

    point: metadata.EntryPoint
    distribution: str
    version: str

    @property
    def key(self) -> str:
        return f"{self.distribution}:{self.point.name}"


@dataclass
class Registry:
    """Every plugin that was found."""

    manager: pluggy.PluginManager
    adapters: dict[str, list[Registered[Adapter]]] = field(default_factory=dict)
    transforms: dict[str, list[Registered[Transform]]] = field(default_factory=dict)
    dialects: list[Dialect] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)


@cache
def registry() -> Registry:
    """Load every installed plugin, once."""
    found = Registry(pluggy.PluginManager(hookspecs.GROUP))
    found.manager.add_hookspecs(hookspecs)
    for entry in _entry_points():
        try:
            with output_to_stderr():
                _load(found, entry)
        except BaseException as error:  # a plugin that fails must not disable the others
            raise_if_out_of_memory(error)
            if not is_fault_of_plugin(error):
                raise
            found.broken.append(Broken(entry.point.name, entry.distribution, in_words(error)))
            if plugin := found.manager.get_plugin(entry.key):
                found.manager.unregister(plugin)
    for broken in found.broken:
        message = f"plugin {broken.entry_point} of {broken.distribution} is not used: {broken.reason}"
        warnings.warn(message, CkptWarning, stacklevel=2)
    return found


def _entry_points() -> list[_EntryPoint]:
    """Return the entry points in our group. The metadata of distributions without one is not parsed."""
    group = f"[{hookspecs.GROUP}]"
    offering = (each for each in metadata.distributions() if group in (each.read_text("entry_points.txt") or ""))
    names = {about["Name"] for about in (distribution.metadata for distribution in offering) if about}
    found: list[_EntryPoint] = []
    for name in sorted(names):
        # A distribution can be found twice: as an editable install and as its source tree. The first one is used.
        distribution = metadata.distribution(name)
        offers, version = distribution.entry_points.select(group=hookspecs.GROUP), distribution.version
        found += [_EntryPoint(entry, name, version) for entry in sorted(offers, key=lambda entry: entry.name)]
    return found


def _load(found: Registry, entry: _EntryPoint) -> None:
    plugin = entry.point.load()
    found.manager.register(plugin, name=entry.key)
    # Otherwise, pluggy silently ignores a hook with a misspelt name.
    found.manager.check_pending()
    offers: list[tuple[dict[str, list[Registered[Any]]], Registered[Any]]] = []
    kinds: tuple[tuple[str, type[Plugin], dict[str, list[Registered[Any]]]], ...] = (
        ("register_adapters", Adapter, found.adapters),
        ("register_transforms", Transform, found.transforms),
    )
    for hook, base, names in kinds:
        for offer in _offered(found.manager, hook, plugin):
            check_offer(offer, base, hook)
            offers.append((names, Registered(offer, entry.point.name, entry.distribution, entry.version)))
    dialects = _offered(found.manager, "register_dialects", plugin)
    for dialect in dialects:
        if not isinstance(dialect, Dialect):
            raise PluginError(f"register_dialects returned {dialect!r}, which is not a Dialect")
    # Register all offers of an entry point or none.
    found.dialects += dialects
    for names, registered in offers:
        note_distribution(registered.plugin, registered.distribution)
        names.setdefault(registered.plugin.name, []).append(registered)


def _offered(manager: pluggy.PluginManager, hook: str, plugin: object) -> list[Any]:
    """Return what a plugin offers through one hook. Not through pluggy, which silently drops None."""
    offers: list[Any] = []
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        if implementation.plugin is plugin:
            found = implementation.function()
            if not isinstance(found, list | tuple):
                raise PluginError(f"{hook} returned a {type(found).__name__}, not a list")
            offers += found
    return offers


def check_offer(offer: Any, base: type[Plugin], hook: str) -> None:
    """Check a class that a plugin returned, before it is registered or used.

    Args:
        offer: the returned value.
        base: `Adapter` or `Transform`.
        hook: name of the hook that returned it, for the error message.

    Raises:
        PluginError: `offer` is not a concrete subclass of `base`, or a class attribute has a wrong type.
    """
    if not (isinstance(offer, type) and issubclass(offer, base)):
        raise PluginError(f"{hook} returned {offer!r}, which is not a subclass of {base.__name__}")
    if isabstract(offer):
        missing = ", ".join(sorted(offer.__abstractmethods__))
        raise PluginError(f"{offer.__name__} does not define {missing}")
    name = getattr(offer, "name", None)
    if not isinstance(name, str) or not name or set(name) & set(":,=[]/ "):
        raise PluginError(f"{offer.__name__} needs a `name` without spaces and without the characters : , = [ ] /")
    offer.summary()
    if issubclass(offer, Adapter):
        suffixes = offer.suffixes
        if not isinstance(suffixes, tuple) or not all(isinstance(suffix, str) and suffix for suffix in suffixes):
            raise PluginError(f"{offer.__name__} needs `suffixes`: a tuple of strings")
        if not isinstance(offer.loads_pickles, bool):
            raise PluginError(f"{offer.__name__} needs `loads_pickles`: True or False")
        _check_incremental(offer)


# The attributes that `IncrementalDirectoryAdapter` adds to `Adapter`.
_INCREMENTAL = ("index_file", "output_files", "is_ignored", "read_overlay")


def _check_incremental(offer: type[Adapter]) -> None:
    """Refuse an adapter that defines only some of the attributes that an incremental edit needs."""
    if issubclass(offer, IncrementalDirectoryAdapter):
        if not isinstance(getattr(offer, "index_file", None), str) or not offer.index_file:
            raise PluginError(f"{offer.__name__} needs `index_file`: a path relative to the directory")
        return
    if found := [name for name in _INCREMENTAL if hasattr(offer, name)]:
        raise PluginError(
            f"{offer.__name__} defines {', '.join(found)}, but is not a subclass of IncrementalDirectoryAdapter"
        )


def find_plugin(names: Mapping[str, Sequence[Registered[_P]]], name: str, kind: str) -> Registered[_P]:
    """Return the plugin called `name`.

    Raises:
        UsageError: no plugin has this name. The hint suggests the most similar name.
        PluginError: several plugins have this name. The message names their distributions.
    """
    offers = names.get(name, ())
    if not offers:
        known = f"there are: {', '.join(sorted(names))}" if names else "none is installed; install the package with pip"
        raise UsageError(f"unknown {kind} {name!r}", hint=did_you_mean(name, names) or known)
    if len(offers) > 1:
        both = " and ".join(f"{offer.distribution} ({offer.entry_point})" for offer in offers)
        raise PluginError(f"{kind} {name!r} is offered by {both}", hint="uninstall one of them")
    return offers[0]


def resolve_chain(transforms: Sequence[TransformLike]) -> tuple[Step, ...]:
    """Turn names, (name, options) pairs and instances into configured transforms.

    Raises:
        UsageError: the message lists every unknown transform, wrong option and syntax error of the chain.
        PluginError: an instance is of an incomplete class, or two plugins have the same name.
    """
    is_list = isinstance(transforms, Sequence) and not isinstance(transforms, str)
    if not is_list or not all(isinstance(item, str | tuple | Transform) for item in transforms):
        message = f"transforms must be a list of strings, (name, options) pairs or instances, not {transforms!r:.60}"
        raise UsageError(message)
    steps: list[Step] = []
    errors: list[UsageError] = []
    for item in transforms:
        try:
            steps.append(_resolve_step(item))
        except UsageError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        listed = (f"{e.key}: {e.message}" if e.key else f"{e.message} ({e.hint})" for e in errors)
        kind = OptionError if all(isinstance(error, OptionError) for error in errors) else UsageError
        raise kind("\n".join(listed), hint=next((e.hint for e in errors if e.key), None))
    return tuple(steps)


def _resolve_step(item: TransformLike) -> Step:
    if isinstance(item, Transform):
        check_offer(type(item), Transform, "a chain")
        distribution = distribution_of(type(item))
        try:
            return Step(item, distribution, metadata.version(distribution))
        except metadata.PackageNotFoundError:  # a module outside any distribution
            return Step(item, distribution, "")
    name, options = _name_and_options(item, "transforms")
    registered = find_plugin(registry().transforms, name, "transform")
    return Step(configure(registered.plugin, options), registered.distribution, registered.version)


def resolve_adapter(item: AdapterLike) -> Adapter:
    """Turn a name, a (name, options) pair or an instance into a configured adapter.

    Raises:
        UsageError: no adapter has this name, or an option is wrong.
        PluginError: an instance is of an incomplete class, or two plugins have the same name.
    """
    if isinstance(item, Adapter):
        check_offer(type(item), Adapter, "a format")
        return item
    name, options = _name_and_options(item, "a format")
    return configure(find_plugin(registry().adapters, name, "format").plugin, options)


def _name_and_options(item: Any, what: str) -> tuple[str, Mapping[str, Any]]:
    if isinstance(item, str):
        return parse_call(item)
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Mapping):
        return item
    raise UsageError(f"{what}: must be a string, a pair (name, dict of options) or an instance, not {item!r:.60}")


def adapters() -> dict[str, type[Adapter]]:
    """Return the adapters by name. Names that two or more plugins share are left out."""
    return {name: offers[0].plugin for name, offers in registry().adapters.items() if len(offers) == 1}


def dialects() -> tuple[Dialect, ...]:
    """Return the declared dialects."""
    return tuple(registry().dialects)


def run_probes(checkpoint: Checkpoint) -> Visits | None:
    """Return the visit counts of the first installed probe that returns any; None if none does.

    Raises:
        PluginError: a probe raised an error, returned a wrong type or wrote into a tensor.
    """
    for probe in reversed(registry().manager.hook.probe_visits.get_hookimpls()):  # in pluggy's order
        distribution, _, name = probe.plugin_name.rpartition(":")
        origin = name or "probe_visits", distribution or "an unknown distribution"
        with plugin_call(*origin):
            visits = probe.function(*[checkpoint.copy() for _ in probe.argnames])  # one argument or none
        if visits is not None and not isinstance(visits, Visits):
            raise defect(f"probe_visits returned a {type(visits).__name__}, not Visits or None", *origin)
        if written := counted_writes(checkpoint):
            raise defect(wrote_into(written), *origin)
        if visits is not None:
            return visits
    return None
