"""Read, convert: the whole flow, top to bottom.

::

    path ──detect──▶ Adapter.read ──bind──▶ Checkpoint
                     Transform.apply, one after the other ──▶ Checkpoint
                     invariants, losses ──▶ go / stop, before a byte is written
                     Adapter.write ──▶ staged ──flush, read back, compare──▶ commit
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vraxion_ckpt import binding, invariants
from vraxion_ckpt.adapter import Adapter, Loss
from vraxion_ckpt.commit import Staged, check_target, staged, write_new
from vraxion_ckpt.compare import checkpoint_differences, same_bits
from vraxion_ckpt.errors import (
    BindingError,
    CkptError,
    CkptWarning,
    InconsistentError,
    InvariantError,
    LossError,
    OptionError,
    PluginError,
    SourceError,
    StorageError,
    TransformError,
    UnknownFormatError,
    UsageError,
)
from vraxion_ckpt.invariants import Preservation
from vraxion_ckpt.model import Checkpoint, HeadKind, Record
from vraxion_ckpt.options import configure
from vraxion_ckpt.plugins import AdapterLike, TransformLike, adapters, resolve_adapter, resolve_chain
from vraxion_ckpt.transform import Step, apply_chain, moved_addresses

PathLike = str | os.PathLike[str]
LossPolicy = Literal["raise", "warn", "ignore"]
OptimizerPolicy = Literal["keep", "drop"]


@dataclass(frozen=True)
class TensorCount:
    """What became of the model's tensors. `renamed` ones are bit-identical under another name."""

    copied: int = 0
    renamed: int = 0
    created: int = 0
    changed: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Summary:
    """What a conversion did, or with `dry_run` would do. `bytes_written` is 0 for a dry run."""

    source: Path
    target: Path
    source_format: str
    target_format: str
    experts_before: int
    experts_after: int
    addresses_moved: int
    tensors: TensorCount
    optimizer: str
    function_preserved: Preservation | None
    losses: tuple[Loss, ...]
    history: tuple[Record, ...]
    side_files: tuple[Path, ...]
    bytes_written: int
    seconds: float
    dry_run: bool


# --- Read ---


def read(
    path: PathLike,
    *,
    from_: AdapterLike | None = None,
    param_names: Sequence[str] | None = None,
    optimizer: OptimizerPolicy = "keep",
    allow_globals: Sequence[str] = (),
) -> Checkpoint:
    """Open a checkpoint of any format; tensors are mapped, and experts in files of their own opened at the first look.

    Args:
        path: a file or a directory.
        from_: its format; found from its content if not given.
        param_names: every optimizer parameter's name in optimizer order, if the file does not tell.
        optimizer: ``drop`` leaves its state behind.
        allow_globals: full names of classes that a pickle may use beside plain data.

    Raises:
        UsageError: there is no such file, or an unknown format.
        SourceError: what is wrong with it, and where.
        BindingError: its optimizer's parameters cannot be told apart.
    """
    if optimizer not in ("keep", "drop"):
        raise UsageError(f"optimizer={optimizer!r}: neither keep nor drop")
    if optimizer == "drop" and param_names is not None:
        raise UsageError("names are given for an optimizer that is to be dropped")
    checkpoint = read_unbound(path, from_=from_, allow_globals=allow_globals)
    if param_names is not None and checkpoint.unbound is None:
        raise UsageError("has no optimizer to give names to", path=path)
    if optimizer == "drop":
        return replace(checkpoint, unbound=None, optimizer=None)
    try:
        return binding.bind(checkpoint, param_names)
    except (BindingError, SourceError) as error:
        error.path = error.path or checkpoint.origin.path
        raise


def read_unbound(path: PathLike, *, from_: AdapterLike | None = None, allow_globals: Sequence[str] = ()) -> Checkpoint:
    """Open a checkpoint as its adapter reads it, its optimizer perhaps without names; refuse an inconsistent one."""
    place = Path(path)
    with _os_errors_named(path):
        adapter = detect_source(place, from_)
        if allow_globals:
            adapter = _allow(adapter, allow_globals)
        with _blamed(adapter):
            checkpoint = adapter.read(place)
    _refuse(InconsistentError, invariants.findings(checkpoint), place)
    return checkpoint


@contextmanager
def _os_errors_named(*paths: PathLike) -> Iterator[None]:
    """Turn what the operating system says of a path, wherever it says it, into an error of ours."""
    for path in paths:
        if not os.fspath(path) or "\0" in str(path):
            raise UsageError(f"{os.fspath(path)!r} is no path")
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UsageError(f"{os.fspath(path)!r} is not UTF-8; torch cannot open such a name") from None
    try:
        yield
    except OSError as error:
        raise StorageError.from_os_error(error, error.filename or paths[0]) from error


def detect_source(path: Path, from_: AdapterLike | None = None) -> Adapter:
    """Return the adapter of an existing file or directory, found from its content.

    A file that no adapter recognises goes to the one whose suffix it bears, which can say what is wrong with it.
    """
    if not path.exists():
        raise UsageError("no such file or directory", path=path)
    if from_ is not None:
        adapter = resolve_adapter(from_)
        if path.is_dir() != adapter.is_directory and not _detects(type(adapter), path):
            kind = "directory" if adapter.is_directory else "file"
            raise UsageError(f"is no {kind}, and the format {adapter.name} is one", path=path)
        return adapter
    known = adapters()
    found = [adapter for adapter in known.values() if _detects(adapter, path)]
    if not found and path.is_file():
        found = [adapter for adapter in known.values() if path.name.endswith(_file_suffixes(adapter))]
    if len(found) == 1:
        return configure(found[0], {})
    if found:
        names = ", ".join(sorted(adapter.name for adapter in found))
        raise UnknownFormatError(f"could be any of {names}", path=path, hint="say which with --from")
    looked_for = "; ".join(f"{a.name} ({a.summary().rstrip('.')})" for a in known.values())
    raise UnknownFormatError("is of no known format", path=path, hint=f"looked for: {looked_for or 'nothing'}")


def _detects(adapter: type[Adapter], path: Path) -> bool:
    try:
        return adapter.detect(path)
    except Exception as error:  # one broken plugin must not take every other format down
        warnings.warn(f"format {adapter.name} could not look at {path}: {error}", CkptWarning, stacklevel=2)
        return False


@contextmanager
def _blamed(adapter: Adapter) -> Iterator[None]:
    """Name the adapter for whatever it raises beside our errors and the operating system's."""
    try:
        yield
    except (CkptError, OSError):
        raise
    except Exception as error:
        raise PluginError(
            f"{type(error).__name__}: {error}", key=adapter.name, hint="this is a defect of the format's plugin"
        ) from error


def _file_suffixes(adapter: type[Adapter]) -> tuple[str, ...]:
    return tuple(suffix for suffix in adapter.suffixes if suffix != "/")


def _allow(adapter: Adapter, names: Sequence[str]) -> Adapter:
    if "allow_global" not in type(adapter).model_fields:
        raise OptionError(f"the format {adapter.name} loads no pickles; --allow-global has no meaning for it")
    return adapter.model_copy(update={"allow_global": tuple(names)})


# --- Convert ---


def convert(
    src: PathLike,
    dst: PathLike,
    *,
    transforms: Sequence[TransformLike] = (),
    from_: AdapterLike | None = None,
    to: AdapterLike | None = None,
    losses: LossPolicy = "raise",
    overwrite: bool = False,
    dry_run: bool = False,
    param_names: Sequence[str] | None = None,
    optimizer: OptimizerPolicy = "keep",
    allow_globals: Sequence[str] = (),
) -> Summary:
    """Read `src`, run a chain of transforms, write `dst`; or raise, and leave everything as it was.

    Args:
        src: a checkpoint of any format; never changed.
        dst: a new path, whose format is `to` or follows from its name.
        transforms: a chain, run from left to right: texts like ``"mitosis_split:noise=0"``, (name, options)
            pairs, or instances.
        losses: what to do about what `dst`'s format cannot hold.
        overwrite: replace an existing `dst`, in one step, once the result is complete.
        dry_run: do everything but write.
        from_: as for `read`.
        to: the format of `dst`.
        param_names: as for `read`.
        optimizer: as for `read`.
        allow_globals: as for `read`.

    Raises:
        CkptError: one subclass for each kind of reason, see `vraxion_ckpt.errors`.
    """
    started = time.monotonic()
    with _os_errors_named(src, dst):
        if losses not in ("raise", "warn", "ignore"):
            raise UsageError(f"losses={losses!r}: none of raise, warn, ignore")
        chain = resolve_chain(transforms)
        adapter, target = detect_target(dst, to)
        source = Path(src)
        _check_places(source, target, adapter, overwrite=overwrite)

        before = read(source, from_=from_, param_names=param_names, optimizer=optimizer, allow_globals=allow_globals)
        _check_apart(target, before)
        before.open_experts()  # a new target holds them all, so all are judged now
        _refuse(InconsistentError, invariants.findings(before), source)
        after, side_files = apply_chain(before, chain)
        _check_side_files(side_files, before, target, _files_named_once(chain, side_files), overwrite=overwrite)
        preservation = _check_result(before, after, chain)
        lost = _check_losses(adapter, after, losses)

        bytes_written = 0
        if dry_run:
            before.sources.verify()
        else:
            bytes_written = _write(adapter, before, after, target, side_files, overwrite=overwrite)
        return Summary(
            source=source,
            target=target,
            source_format=before.origin.format,
            target_format=adapter.name,
            experts_before=before.num_experts,
            experts_after=after.num_experts,
            addresses_moved=moved_addresses(before, after),
            tensors=_count_tensors(before, after),
            optimizer=_optimizer_in_words(before, after, optimizer),
            function_preserved=preservation,
            losses=tuple(lost),
            history=after.history[len(before.history) :],
            side_files=tuple(side_files),
            bytes_written=bytes_written,
            seconds=time.monotonic() - started,
            dry_run=dry_run,
        )


def detect_target(dst: PathLike, to: AdapterLike | None = None) -> tuple[Adapter, Path]:
    """Return the adapter and the final path for a target that may not exist yet.

    A symbolic link is followed, so that it still is one afterwards.
    """
    text = os.fspath(dst)
    target = Path(os.path.realpath(text))
    known = adapters()
    if to is not None:
        adapter = resolve_adapter(to)
    else:
        found = [adapter for adapter in known.values() if text.endswith(adapter.suffixes)]
        if target.is_dir():
            found = [a for a in known.values() if a.is_directory and _detects(a, target)] or found
        if len(found) != 1:
            choices = ", ".join(f"*{suffix} → {a.name}" for a in known.values() for suffix in a.suffixes)
            raise UsageError("its name does not tell the format", path=text, hint=f"pass --to, or use {choices}")
        adapter = configure(found[0], {})
    if not target.name:
        raise UsageError("is no place to write to", path=text)
    if target.exists() and not (target.is_dir() or target.is_file()):
        raise UsageError("is neither a file nor a directory, and is not replaced", path=target)
    if target.exists() and target.is_dir() != adapter.is_directory:
        kind = "directory" if adapter.is_directory else "file"
        raise UsageError(f"the format {adapter.name} is a {kind}, and something else is there", path=target)
    if text.endswith("/") and not adapter.is_directory:
        raise UsageError(f"the format {adapter.name} is a file, and the name ends in /", path=text)
    return adapter, target


def _check_places(source: Path, target: Path, adapter: Adapter, *, overwrite: bool) -> None:
    """Refuse a target that is the source, lies inside it or around it, or holds what is not ours to replace."""
    real = Path(os.path.realpath(source))
    if source.exists() and (real == target or (target.exists() and real.samefile(target))):
        raise UsageError("source and target are the same", path=target, hint="write to a new path")
    if real in target.parents and real.is_dir():
        raise UsageError("the target lies inside the source", path=target, hint="write to a path outside it")
    if target in real.parents:
        raise UsageError("the source lies inside the target", path=target, hint="write to a path beside it")
    check_target(target, overwrite=overwrite)
    foreign = adapter.foreign_files(target) if target.exists() and adapter.is_directory else []
    if foreign:
        raise UsageError(
            f"holds {len(foreign)} files that are no part of a {adapter.name} checkpoint, such as {foreign[0].name}; "
            "replacing it would delete them",
            path=target,
            hint="write to a new path",
        )


def _check_apart(target: Path, before: Checkpoint) -> None:
    """Refuse to write into the source, whose extent is known only now that it is open."""
    root = Path(os.path.realpath(before.origin.path or "."))
    files = {Path(os.path.realpath(source.path)) for source in before.sources}
    if target == root or target in files or root in target.parents:
        raise UsageError("lies inside the source", path=target, hint="write to a path outside it")
    if target in root.parents or any(target in file.parents for file in files):
        raise UsageError("the source lies inside it", path=target, hint="write to a path beside it")


def _files_named_once(chain: Sequence[Step], side_files: dict[Path, bytes]) -> set[Path]:
    """Return the files that options of the chain name beside those it writes."""
    named = [value for step in chain for value in dict(step.transform).values() if isinstance(value, Path)]
    for path in side_files:
        if path in named:
            named.remove(path)
    return {Path(os.path.realpath(path)) for path in named}


def _check_side_files(
    side_files: dict[Path, bytes], before: Checkpoint, target: Path, inputs: set[Path], *, overwrite: bool
) -> None:
    for path in side_files:
        real = Path(os.path.realpath(path))
        if real == target or target in real.parents:
            raise UsageError("a side file must not be, or lie in, the target", path=path)
        _check_apart(real, before)
        if real in inputs:
            raise UsageError("a side file must not replace a file that the chain reads", path=path)
        if real.is_dir():
            raise UsageError("is a directory, not a file to write", path=path)
        check_target(real, overwrite=overwrite)


def _check_result(before: Checkpoint, after: Checkpoint, chain: Sequence[Step]) -> Preservation | None:
    """Hold the chain to what must be true after it."""
    _refuse(InvariantError, invariants.findings(after), after.origin.path)
    _refuse(InvariantError, invariants.sharing_findings(before, after), after.origin.path)
    if not any(invariants.missing_siblings(before)):
        _refuse(InvariantError, invariants.missing_siblings(after), after.origin.path)
    noises = [step.transform.function_noise() for step in chain]
    known = [noise for noise in noises if noise is not None]
    preservation = invariants.preservation(before, after, sum(known) if len(known) == len(noises) else None)
    if preservation and not preservation.as_asked:
        raise InvariantError(f"the function was to be preserved: {preservation}", path=after.origin.path)
    if chain:
        _warn_of_leftovers(before, after)
    return preservation


def _refuse(error: type[InconsistentError] | type[InvariantError], findings: Iterator[str], path: Path | None) -> None:
    listed = list(islice(findings, 20))
    if listed:
        raise error("; ".join(listed[:3]) + (f"; and {len(listed) - 3} more" if listed[3:] else ""), path=path)


def _warn_of_leftovers(before: Checkpoint, after: Checkpoint) -> None:
    """Say what a chain has left as it was although it belongs to what the chain changed."""
    if after.head and after.head.kind is HeadKind.EXPERTS and after.num_experts == 1:
        message = "one expert under head.experts.* is loaded by no runtime; let mitosis_split follow"
        warnings.warn(message, CkptWarning, stacklevel=4)
    if before.head is None or after.head is None or before.num_experts == after.num_experts:
        return
    prefixes = (before.head.names.single, before.head.names.experts)
    for key, value in _dicts_in(after.payload):
        if {"state", "param_groups"} <= value.keys():
            raise TransformError(
                "is an optimizer's state, which cannot be grown where it stands", key=key, hint="save it under `optim`"
            )
        if any(str(name).startswith(prefixes) for name in value):
            message = f"the payload's {key!r} also names tensors of the head; it is carried along unchanged"
            warnings.warn(message, CkptWarning, stacklevel=4)


def _dicts_in(value: Any, key: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield every dict inside a plain value with the path that leads there."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for name, entry in entries:
        place = f"{key}.{name}" if key else str(name)
        if isinstance(entry, dict):
            yield place, entry
        if isinstance(entry, dict | list | tuple):
            yield from _dicts_in(entry, place)


def _check_losses(adapter: Adapter, checkpoint: Checkpoint, policy: LossPolicy) -> list[Loss]:
    with _blamed(adapter):
        lost = adapter.losses(checkpoint)
    if lost and policy == "raise":
        listed = "; ".join(map(str, lost))
        raise LossError(f"{adapter.name} cannot hold {listed}", hint="pass --losses warn to write it without")
    if policy == "warn":
        for loss in lost:
            warnings.warn(f"{adapter.name} cannot hold {loss}", CkptWarning, stacklevel=3)
    return lost


def _write(
    adapter: Adapter,
    before: Checkpoint,
    after: Checkpoint,
    target: Path,
    side_files: dict[Path, bytes],
    *,
    overwrite: bool,
) -> int:
    """Stage, flush, read back, compare, and only then commit; return the bytes written."""
    with ExitStack() as stack:
        stage = stack.enter_context(staged(target, directory=adapter.is_directory, overwrite=overwrite))
        with _meanwhile(before.sources.verify), _blamed(adapter):
            held = adapter.held(after)
            try:
                adapter.write(held, stage.path)
            except StorageError:
                before.sources.check_unchanged()  # a source that is cut short fails wherever it is read
                raise
        stages = [stage]
        for path, content in side_files.items():
            real = Path(os.path.realpath(path))
            side = stack.enter_context(staged(real, directory=False, overwrite=overwrite))
            write_new(side.path, content)
            stages.append(side)
        for each in stages:
            each.flush()
        before.sources.verify()
        _read_back(adapter, held, stage)
        before.sources.check_unchanged()
        size = sum(_size(each.path) for each in stages)
        for each in reversed(stages):  # the target last: if it is there, all is there
            each.publish()
    return size


def _read_back(adapter: Adapter, expected: Checkpoint, stage: Staged) -> None:
    """Read the staged result as anyone would and compare it with what it was made from."""
    with _blamed(adapter):
        found = adapter.read(stage.path)
    if found.param_names not in (None, expected.param_names):
        raise InvariantError("param_names came back changed", path=stage.target)
    found = binding.bind(found)
    with _meanwhile(found.sources.verify):
        _refuse(InvariantError, checkpoint_differences(expected, found), stage.target)
    found.sources.verify()  # shards that the comparison has opened


@contextmanager
def _meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Do `work`, which mostly runs outside Python, in a thread beside the block; raise what it raises."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work)
        yield
        result.result()


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return sum(file.stat().st_size for file in files)


# --- Tell ---


def _count_tensors(before: Checkpoint, after: Checkpoint) -> TensorCount:
    old, new = before.state_dict(), after.state_dict()
    known = {id(tensor) for tensor in old.values()}
    counts: dict[str, int] = dict.fromkeys(("copied", "renamed", "created", "changed", "dropped"), 0)
    moved: set[int] = set()
    for name, tensor in new.items():
        if name in old:
            counts["copied" if same_bits(old[name], tensor) else "changed"] += 1
        elif id(tensor) in known:
            counts["renamed"] += 1
            moved.add(id(tensor))
        else:
            counts["created"] += 1
    counts["dropped"] = sum(name not in new and id(tensor) not in moved for name, tensor in old.items())
    return TensorCount(**counts)


def _optimizer_in_words(before: Checkpoint, after: Checkpoint, policy: OptimizerPolicy) -> str:
    if after.optimizer is not None:
        number = len(after.optimizer.params)
        return f"carried: {number} parameters, bound by {after.optimizer.bound_by}"
    if policy == "drop":
        return "dropped, as asked; build a new one when you resume"
    return "dropped by the chain" if before.optimizer is not None else "none in the source"


# --- Look ---


@dataclass(frozen=True)
class Inspection:
    """What is known of a checkpoint without reading its tensors' values."""

    checkpoint: Checkpoint
    binding_error: str | None = None
    losses: dict[str, list[Loss]] = field(default_factory=dict)


def inspect(
    path: PathLike,
    *,
    from_: AdapterLike | None = None,
    param_names: Sequence[str] | None = None,
    allow_globals: Sequence[str] = (),
) -> Inspection:
    """Open a checkpoint for people: an optimizer that cannot be bound is a finding, not an error.

    Args:
        path: a file or a directory.
        from_: as for `read`.
        param_names: as for `read`.
        allow_globals: as for `read`.

    Raises:
        UsageError: there is no such file, or an unknown format.
        SourceError: what is wrong with it, and where.
    """
    checkpoint = read_unbound(path, from_=from_, allow_globals=allow_globals)
    error = None
    try:
        checkpoint = binding.bind(checkpoint, param_names)
    except BindingError as refused:
        error = str(refused)
    lost = {name: configure(adapter, {}).losses(checkpoint) for name, adapter in sorted(adapters().items())}
    return Inspection(checkpoint, error, lost)


def total_bytes(tensors: dict[str, Tensor]) -> int:
    """Sum the sizes of tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
