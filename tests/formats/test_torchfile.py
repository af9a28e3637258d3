"""Hostile pickles: each is rejected quickly, with the right class of error, and runs no code."""

from __future__ import annotations

import argparse
import errno
import io
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hostile import FOUR, call, number, read, refused, tensor, text, write_pickle
from support import DATA, assert_same
from torch import nn

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint import plain_data, source_files
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences, differences, same_bits
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.provenance import Record
from vraxion_ckpt.checkpoint.source_files import Sources
from vraxion_ckpt.checkpoint.tensor_dict import referenced, resolved
from vraxion_ckpt.errors import (
    ChangedError,
    CkptError,
    CorruptError,
    InconsistentError,
    InvariantError,
    LimitError,
    SourceError,
    StorageError,
    UnsafeError,
    UnsupportedError,
)
from vraxion_ckpt.formats import torch_archive, torch_pickle, torch_reader, torch_writer
from vraxion_ckpt.formats.torch_writer import save_torch_file

NUMPY = ["numpy.dtype", "numpy.ndarray", "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.pt"


def test_a_pickle_made_by_these_tests_is_read_where_nothing_is_wrong_with_it(path: Path) -> None:
    write_pickle(path, b"}" + text("w") + tensor((2, 2), (1, 2)) + b"s", FOUR)
    assert not list(differences({"w": torch.tensor([[0.0, 2.0], [1.0, 3.0]])}, read(path)))


# --- Unsafe ---


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (self._command,)


def test_a_call_of_os_system_is_unsafe_and_never_runs(path: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    torch.save({"model": {"w": torch.zeros(2)}, "losses": [Evil(f"touch {proof}")]}, path)
    error = refused(path, UnsafeError, r"would call posix\.system")
    assert "do not load this file" in str(error.hint)
    refused(path, UnsafeError, "module posix is blocked", allow_globals=["posix.system"])
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # the payload works outside of the reader


def test_a_pickled_module_is_unsafe(path: Path) -> None:
    torch.save(nn.Linear(2, 2), path)
    error = refused(path, UnsafeError, r"torch\.nn\.modules\.linear\.Linear")
    assert error.hint == "save a dict with the model's state_dict()"


class Config:
    """An object that a trainer may store beside the model."""


def test_every_global_that_is_not_allowed_is_named(path: Path) -> None:
    torch.save({"model": {}, "config": Config(), "more": [{"at": Path("x")}]}, path)
    error = refused(path, UnsafeError, re.escape(f"{__name__}.Config"))
    assert "pathlib.PosixPath" in error.message
    assert error.key == "config"
    assert error.hint == "leave out what cannot be carried: --drop-key config --drop-key 'more[0].at'"


@pytest.mark.parametrize(
    "value",
    [
        defaultdict(list, {"loss": [1.0]}),
        range(3),
        frozenset({1}),
        slice(1),
        argparse.Namespace(lr=np.float64(0.1), deep=[Config()]),
        Path("x"),
        datetime(2020, 1, 1, tzinfo=UTC),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_harmless_object_is_no_attack_and_can_be_left_out(path: Path, value: Any) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "args": {"it": value, "other": 1}}, path)
    error = refused(path, UnsafeError)
    assert (error.key, error.hint) == ("args.it", "leave out what cannot be carried: --drop-key args.it")
    found, dropped = torch_reader.load_torch_payload(path, Sources(), (), ["args.it"])
    assert dropped == ["args.it"]
    assert_same(resolved(found), {"model": {"w": torch.ones(2)}, "args": {"other": 1}})


def numpy_values() -> dict[str, Any]:
    return {
        "losses": [np.float64(0.1), np.float32(0.5), np.int64(-3), np.bool_(True), np.float16("nan")],
        "others": (
            np.complex64(1 - 2j),
            np.str_("\u00e4"),
            np.str_(""),
            np.bytes_(b"x"),
            np.datetime64("2020-01-01", "D"),
        ),
        "state": np.random.RandomState(0).get_state(),
        "arrays": [
            np.arange(6, dtype=np.uint16).reshape(2, 3),
            np.arange(6.0).reshape(2, 3, order="F"),
            np.array(1.5, np.float32),
            np.zeros((0, 3)),
            np.array([["a", "bc"]]),
            np.array(["2020", "NaT"], "M8[s]"),
            np.arange(10)[::2],
            np.array([2, 3], "m8"),
        ],
        "keys": {np.int8(1): {np.float32(2.5), (np.str_("x"), 1)}},
    }


def test_numpy_values_keep_their_types_once_their_names_are_allowed(path: Path, tmp_path: Path) -> None:
    value = {"model": {"w": torch.ones(2)}, **numpy_values()}
    torch.save(value, path)
    error = refused(path, UnsafeError, r"numpy\.dtype")
    assert error.key == "losses[0]"
    names = re.findall(r"--allow-global (\S+)", str(error.hint))
    assert len(names) == 4
    assert "--drop-key" not in str(error.hint)
    again = tmp_path / "again.pt"
    save_torch_file(read(path, names), again)
    for found in (read(path, names), read(again, names), torch.load(again, weights_only=False)):
        assert_same(found, torch.load(path, weights_only=False))
    with torch.serialization.safe_globals(
        [np.ndarray, np.dtype, np._core.multiarray._reconstruct, np._core.multiarray.scalar, bytes]
        + [type(np.dtype(code)) for code in "?bhilqBHILQefdFSUMm"]
    ):
        assert_same(torch.load(again, weights_only=True), torch.load(path, weights_only=False))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (np.array([object, None]), "numpy array of objects"),
        (np.zeros(2, "i4,f8"), "numpy array of records"),
        (np.zeros(2, "i4,f8")[0], "numpy number of records"),
        (np.longdouble(1), "numpy number of dtype 'f16'"),
        (np.dtype("f4"), "is a numpy dtype"),
        (np.matrix([[1]]), "subclass of a numpy array"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_allowing_numpy_is_not_proposed_where_it_would_not_suffice(path: Path, value: Any, match: str) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "x": value}, path)
    with pytest.raises(SourceError, match=match) as caught:
        read(path)
    assert (caught.value.key, caught.value.hint) == ("x", "leave out what cannot be carried: --drop-key x")


def test_a_hint_names_both_what_to_allow_and_what_to_leave_out(path: Path) -> None:
    torch.save({"model": {}, "best": np.float64(0.1), "args": Config()}, path)
    hint = str(refused(path, UnsafeError).hint)
    allowed, dropped = re.findall(r"--allow-global (\S+?);? ", hint), re.findall(r"--drop-key (\S+)", hint)
    assert len(allowed) == 2
    found, _ = torch_reader.load_torch_payload(path, Sources(), allowed, dropped)
    assert_same(resolved(found), {"model": {}, "best": np.float64(0.1)})


def dtype_of(code: str, endian: str = "<", inner: bytes = b"NNN") -> bytes:
    state = b"(K\3" + text(endian) + inner + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    return call("numpy.dtype", text(code), b"\x89\x88") + state


def raw(data: str) -> bytes:
    return call("_codecs.encode", text(data), text("latin1"))


def array_of(shape: bytes, data: bytes, dtype: bytes | None = None, order: bytes = b"\x89") -> bytes:
    new = call("numpy._core.multiarray._reconstruct", b"cnumpy\nndarray\n", b"K\0\x85", raw("b"))
    return new + b"(K\1" + shape + (dtype_of("f8") if dtype is None else dtype) + order + data + b"tb"


@pytest.mark.parametrize(
    ("operations", "error", "match"),
    [
        (array_of(b"K\1\x85", raw("x" * 8)), None, ""),
        (array_of(number(10**12) + b"\x85", raw("x" * 8)), CorruptError, "do not fit its shape"),
        (array_of(b"(" + number(2**40) * 2 + b"K\0t", b"cbuiltins\nbytes\n)R"), CorruptError, "too large"),
        (array_of(b"J\xff\xff\xff\xff\x85", raw("x" * 8)), CorruptError, "shape is not valid"),
        (array_of(b"(" + b"K\1" * 40 + b"t", raw("x" * 8)), CorruptError, "shape is not valid"),
        (array_of(b"K\1\x85", raw("x" * 8), order=b"K\0"), CorruptError, "do not fit its shape"),
        (array_of(b"K\1\x85", text("x" * 8)), CorruptError, "without bytes"),
        (array_of(b"K\1\x85", b"]Na", dtype_of("O8")), UnsupportedError, "array of objects"),
        (array_of(b"K\1\x85", raw("x" * 8)) + b"}" + text("data") + b"Nsb", CorruptError, "set twice"),
        (array_of(b"K\1\x85", raw("x" * 8))[:-1] + b"0", UnsupportedError, "torch.save does not write"),
        (array_of(b"K\1\x85", raw("x" * 8), dtype_of("f8", inner=b"])}")), UnsupportedError, "array of dtype"),
        (array_of(b"K\1\x85", raw("x" * 8), dtype_of("f8", "!")), UnsupportedError, "array of dtype"),
        (array_of(b"K\1\x85", raw("x" * 8), b"N"), CorruptError, "unknown state"),
        (call("numpy._core.multiarray._reconstruct", b"cnumpy\nndarray\n"), UnsupportedError, "incomplete"),
        (call("numpy._core.multiarray.scalar", dtype_of("f8"), raw("x" * 7)), CorruptError, "8 bytes"),
        (call("numpy._core.multiarray.scalar", dtype_of("b1", "|"), raw("\x02")), CorruptError, "1 bytes"),
        (
            call("numpy._core.multiarray.scalar", dtype_of("f8", ">"), raw("x" * 8)),
            UnsupportedError,
            "number of dtype >f8",
        ),
        (call("numpy._core.multiarray.scalar", dtype_of("U1"), raw("\xff" * 4)), CorruptError, "pickle is damaged"),
        (call("numpy._core.multiarray.scalar", text("f8"), raw("x" * 8)), CorruptError, "without a dtype"),
        (call("numpy.dtype", number(10**12)), CorruptError, "unknown arguments"),
        (call("numpy.ndarray", number(10**12)), CorruptError, "pickle is damaged"),
    ],
)
def test_a_numpy_value_that_does_not_fit_its_bytes_is_refused(
    path: Path, operations: bytes, error: type[CkptError] | None, match: str
) -> None:
    write_pickle(path, b"}" + text("x") + operations + b"s")
    if error is None:
        assert_same(read(path, NUMPY), torch.load(path, weights_only=False))
    else:
        refused(path, error, match, NUMPY)


def test_arrays_that_share_their_bytes_are_beyond_the_limit(path: Path) -> None:
    array = array_of(number(10**6) + b"\x85", b"h\0", dtype_of("u1", "|"))
    write_pickle(path, b"(" + raw("x" * 10**6) + b"q\0" + array * 50 + b"t")
    refused(path, LimitError, "copies far more data than it has", NUMPY)


def test_a_name_that_was_allowed_for_one_file_is_not_allowed_for_the_next(path: Path) -> None:
    torch.save({"losses": [np.float64(0.1)]}, path)
    names = re.findall(r"--allow-global (\S+)", str(refused(path, UnsafeError).hint))
    read(path, names)
    refused(path, UnsafeError)


@pytest.mark.parametrize(
    "name", ["torch.Tensor", "torch.FloatTensor", "torch.storage.UntypedStorage", "torch.cuda.FloatStorage"]
)
def test_memory_that_is_not_in_the_file_is_never_read(path: Path, name: str) -> None:
    """torch allows these classes by default; called with a number, they return uninitialised memory."""
    write_pickle(path, b"}" + text("w") + call(name, number(1000)) + b"s")
    refused(path, UnsafeError, "memory that is not in the file")


def test_a_text_encoding_that_takes_hours_is_unsafe(path: Path) -> None:
    write_pickle(path, call("_codecs.encode", text("\u00e4" * 10**6), text("punycode")))
    refused(path, UnsafeError, r"_codecs\.encode")


# --- Unsupported ---


class Marked(torch.Tensor):
    """A subclass of tensors."""


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.tag = "head"  # type: ignore[attr-defined]
    return tensor


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.eye(3).to_sparse(), r"\[model\.w\]: is a sparse tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), r"\[model\.w\]: is a sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), r"\[model\.w\]: is a quantised"),
        (lambda: torch.ones(2, device="meta"), r"\[model\.w\]: is a tensor without data"),
        (lambda: torch.ones(2).as_subclass(Marked), "a tensor subclass"),
        (lambda: nn.Buffer(torch.ones(2)), "a tensor subclass"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
        (lambda: with_attribute(torch.ones(2)), "attributes"),
        (lambda: with_attribute(nn.Parameter(torch.ones(2))), "attributes"),
    ],
    ids=range(9),
)
def test_what_a_converter_cannot_vouch_for_is_unsupported(path: Path, make: Callable[[], Any], match: str) -> None:
    torch.save({"model": {"w": make()}}, path)
    refused(path, UnsupportedError, match)


def test_another_pickle_protocol_is_unsupported(path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}}, path, pickle_protocol=4)
    refused(path, UnsupportedError, "torch.save does not write")


# --- Limit ---


@pytest.mark.parametrize(
    ("size", "stride"),
    [((10**12,), (0,)), ((10**6, 10**6), (0, 0)), ((2, 3), (1, 1)), ((3, 2), (1, 2)), ((0, 2**60), (1, 1))],
)
def test_a_tensor_that_repeats_its_storage_is_beyond_the_limit(
    path: Path, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    write_pickle(path, b"}" + text("w") + tensor(size, stride, 8) + b"s", {"0": bytes(32)})
    assert refused(path, LimitError, "repeats its storage|has a dimension over").key == "w"


def test_torchs_own_expanded_and_overlapping_views_are_beyond_the_limit(path: Path) -> None:
    for view in (torch.ones(1).expand(10**12), torch.arange(6.0).as_strided((2, 3), (1, 1))):
        torch.save({"model": {"w": view}}, path)
        assert refused(path, LimitError, "repeats its storage").key == "model.w"


def bomb(levels: int) -> bytes:
    """Nested lists, each of which holds the previous one twice."""
    memo = [struct.pack("<I", level) for level in range(levels)]
    return b"]r" + memo[0] + b"".join(b"](j" + below + b"j" + below + b"er" + own for below, own in pairwise(memo))


@pytest.mark.parametrize("allow_globals", [[], ["numpy.dtype"]], ids=["plain", "numpy allowed"])
@pytest.mark.parametrize("levels", [24, 90])
def test_lists_that_share_lists_are_beyond_the_limit(path: Path, levels: int, allow_globals: list[str]) -> None:
    write_pickle(path, bomb(levels))
    refused(path, LimitError, "more than 5000000 values", allow_globals)


def test_lists_that_share_a_list_are_read_where_that_is_harmless(path: Path) -> None:
    write_pickle(path, bomb(4))
    assert read(path) == [[[[], []], [[], []]], [[[], []], [[], []]]]


@pytest.mark.parametrize("allow_globals", [[], ["numpy.dtype"]], ids=["plain", "numpy allowed"])
def test_a_list_that_holds_itself_is_beyond_the_limit(path: Path, allow_globals: list[str]) -> None:
    write_pickle(path, b"]q\0h\0a")
    refused(path, LimitError, "nested deeper", allow_globals)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "operations",
    [
        b"]" * 200_000 + b"a" * 199_999,
        b"N" + b"\x85" * 200_000,
        (b"}" + text("a")) * 200_000 + b"}" + b"s" * 200_000,
        bomb(90).replace(b"er", b"e\x85r"),
    ],
    ids=["lists", "tuples", "dicts", "shared"],
)
@pytest.mark.parametrize("allow_globals", [[], ["numpy.dtype"]], ids=["plain", "numpy allowed"])
def test_deep_nesting_is_beyond_the_limit(path: Path, operations: bytes, allow_globals: list[str]) -> None:
    write_pickle(path, operations)
    refused(path, LimitError, "nested deeper", allow_globals)


def holders(key: bytes) -> dict[str, bytes]:
    """Return pickles that have a key."""
    return {
        "dict": b"}" + key + b"Ns",
        "items": b"}(" + key + b"Nu",
        "set": call("builtins.set", b"](" + key + b"e"),
        "Counter": call("collections.Counter", b"}" + key + b"Ns"),
        "OrderedDict": call("collections.OrderedDict") + key + b"Ns",
    }


@pytest.mark.parametrize("holder", holders(b""))
def test_a_tuple_is_read_as_a_key(path: Path, holder: str) -> None:
    write_pickle(path, holders(b"K\1" + b"\x85" * 50)[holder])
    assert_same(read(path), torch.load(path, weights_only=True))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "key",
    [
        b"N" + b"\x85" * 1_000_000,
        b"N\x85q\0" + b"".join(b"h%bh%b\x86q%b" % (bytes([n]), bytes([n]), bytes([n + 1])) for n in range(90)),
        b"(" + b"N" * 1000 + b"t",
    ],
    ids=["deep", "shared", "long"],
)
@pytest.mark.parametrize("holder", holders(b""))
def test_a_large_tuple_is_never_hashed(path: Path, holder: str, key: bytes) -> None:
    """Hashing the deep one would overflow the C stack and end the process; the shared one would take 2⁹⁰ steps."""
    write_pickle(path, holders(key)[holder])
    refused(path, LimitError, "a tuple of more than a hundred values")


def same_hash(count: int) -> list[bytes]:
    """Return opcodes that put items into a dict whose keys have the same hash."""
    return [b"\x8a\x0b" + (n * (2**61 - 1)).to_bytes(11, "little") + b"Ns" for n in range(count)]


@pytest.mark.parametrize("holder", ["dict", "items", "set", "OrderedDict", "attributes"])
def test_keys_that_have_the_same_hash_are_beyond_the_limit(path: Path, holder: str) -> None:
    """Storing so many of them would take minutes."""
    items = same_hash(60_000)
    numbers = [item[:-2] for item in items]
    pairs = [b"(" + b"".join(one + b"N" for one in numbers[at : at + 1000]) + b"u" for at in range(0, 60_000, 1000)]
    made = {
        "dict": b"}" + b"".join(items),
        "items": b"}" + b"".join(pairs),
        "set": call("builtins.set", b"](" + b"".join(numbers) + b"e"),
        "OrderedDict": call("collections.OrderedDict") + b"".join(pairs),
        "attributes": call("collections.OrderedDict") + b"}" + b"".join(pairs) + b"b",
    }
    write_pickle(path, made[holder])
    refused(path, LimitError, "hashes are the same")


def test_many_keys_of_different_hashes_are_read(path: Path) -> None:
    value = {
        "table": {(x, 0.5 + y): x for x in range(120) for y in range(120)},
        "seen": {2**40 + n for n in range(20_000)},
    }
    torch.save(value, path)
    assert_same(read(path), value)


def test_nothing_happens_with_an_object_that_is_left_out(path: Path) -> None:
    """A pickle may call it, set its state, and give it items, entries and keys."""
    name = b"cevil\nThing\n"
    whatever = name + b")R" + b"}b" + text("x") + b"a" + b"(" + text("x") + b"e" + b"N\x85Ns" + b"(NNu" + b")R)R"
    write_pickle(path, b"}" + text("x") + b"(" + whatever + name + b")\x81" + name + b"ts" + text("y") + b"K\1s")
    assert refused(path, UnsafeError, r"evil\.Thing").key == "x[0]"
    assert torch_reader.load_torch_payload(path, Sources(), (), ["x"]) == ({"y": 1}, ["x"])


@pytest.mark.parametrize(
    "operations", [b"cevil\nThing\n)RNs", b"cevil\nThing\nNs", text("a") + call("evil.f") + b"s" + text("a") + b"Ns"]
)
def test_an_object_that_no_entry_holds_is_refused(path: Path, operations: bytes) -> None:
    write_pickle(path, b"}" + operations)
    refused(path, UnsafeError, r"evil\.")


def test_an_attack_is_refused_even_if_it_is_left_out(path: Path, tmp_path: Path) -> None:
    torch.save({"model": {}, "x": Evil(f"touch {tmp_path / 'proof'}")}, path)
    with pytest.raises(UnsafeError, match="posix"):
        torch_reader.load_torch_payload(path, Sources(), (), ["x"])
    assert not (tmp_path / "proof").exists()


def test_many_calls_that_copy_one_long_text_are_beyond_the_limit(path: Path) -> None:
    encode = call("_codecs.encode", b"h\0", text("latin1"))
    write_pickle(path, b"(" + text("a" * 10**6) + b"q\0" + encode * 20_000 + b"t")
    refused(path, LimitError, "copies far more data than it has")


def test_many_attributes_copied_to_many_dicts_are_beyond_the_limit(path: Path) -> None:
    state = b"}q\0(" + b"".join(text(f"{i}") + b"N" for i in range(5000)) + b"u"
    write_pickle(path, b"(" + state + (call("collections.OrderedDict") + b"h\0b") * 5000 + b"t")
    refused(path, LimitError, "copies far more data than it has")


def test_a_bytearray_is_refused_before_it_takes_its_memory(path: Path) -> None:
    for name in ("builtins.bytearray", "__builtin__.bytearray"):  # as Python 3 and 2 call it
        write_pickle(path, call(name, number(10**11)))
        refused(path, UnsafeError, r"builtins\.bytearray")
    write_pickle(path, b"\x96" + struct.pack("<Q", 10**11))
    refused(path, UnsupportedError, "torch.save does not write")


# --- Corrupt ---


@pytest.mark.parametrize(
    ("operations", "match"),
    [
        (b"", "pickle is damaged"),
        (b"h\7", "pickle is damaged"),
        (b"\xff", "pickle is damaged"),
        (b"}" + text("a")[:-1], "pickle is damaged"),
        (text("x") + b"Q", "not a storage"),
        (call("collections.OrderedDict", b"](](N\x85Nee"), "OrderedDict with arguments"),
        (tensor((5,), (1,)), "torch cannot read it"),
        (tensor((2, 2), (1, 3)), "torch cannot read it"),
        (tensor((-1,), (1,)), "torch cannot read it"),
        (tensor((4,), (-1,)), "torch cannot read it"),
        (tensor((5,), (1,), held=5), "asks for 20 bytes, but its storage has 16"),
        (tensor((3,), (1,), held=3), "asks for 12 bytes, but its storage has 16"),
        (tensor((4,), (1,)).replace(b"FloatS", b"QuadS"), "unknown storage type"),
        (tensor((4,), (1,)).replace(text("0"), text("1")), "storage is missing"),
    ],
)
def test_a_pickle_that_does_not_fit_its_storages_is_corrupt(path: Path, operations: bytes, match: str) -> None:
    write_pickle(path, operations, FOUR)
    refused(path, CorruptError, match)


# --- Inconsistent: valid files that are no checkpoints ---


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([torch.ones(2)], "holds a list, not a dict"),
        (torch.ones(2), "holds a Tensor, not a dict"),
        ({"losses": [1.0]}, "no dialect recognises a model"),
        ({"model": {0: torch.ones(2)}}, "keys must be text"),
        ({0: torch.ones(2)}, "keys must be text"),
        ({"model": {1.5: torch.ones(2)}}, "keys must be text"),
        ({"model": {"head.single.w": torch.ones(2), "head.experts.0.w": torch.ones(2)}}, "holds both"),
    ],
)
def test_a_payload_whose_parts_contradict_each_other_is_inconsistent(path: Path, value: Any, match: str) -> None:
    torch.save(value, path)
    with pytest.raises(InconsistentError, match=match) as caught:
        vc.open(path)
    assert caught.value.path == path


def test_every_way_to_pickle_a_call_of_a_function_is_seen(path: Path, tmp_path: Path) -> None:
    """Protocol 2 has three ways, and older protocols have more; none of them may run."""
    proof = tmp_path / "proof"
    argument = text(f"touch {proof}")
    ways = {
        "reduce": b"cos\nsystem\n" + argument + b"\x85R",
        "new object": b"cos\nsystem\n" + argument + b"\x85\x81",
        "build": b"cos\nsystem\n" + argument + b"b",
        "inst": b"(" + argument + b"ios\nsystem\n",
        "object": b"(cos\nsystem\n" + argument + b"o",
        "stack global": text("os") + text("system") + b"\x93" + argument + b"\x85R",
    }
    for operations in ways.values():
        write_pickle(path, operations)
        with pytest.raises((UnsafeError, UnsupportedError)):
            read(path)
        assert not proof.exists()
    pickle.loads(b"\x80\x02" + ways["reduce"] + b".")
    assert proof.exists()


# --- Changed ---


def test_a_file_that_is_replaced_while_it_is_being_opened_has_changed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.ones(2)}, path)
    original = torch_pickle.read_pickle

    def read_slowly(*args: Any) -> Any:
        torch.save({"w": torch.zeros(2)}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        return original(*args)

    monkeypatch.setattr(torch_reader, "read_pickle", read_slowly)
    refused(path, ChangedError, "changed while it was being read")


# --- Written ---

MANY = {
    "large": torch.arange(200_000.0).reshape(400, 500),
    "odd": torch.arange(2**17 + 3, dtype=torch.uint8),
    "small": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0),
    "scalar": torch.tensor(2.5),
    "flags": torch.tensor([True, False]),
}
MANY["view"] = MANY["large"][3:5].t()


def test_every_checksum_of_a_written_file_is_right(path: Path) -> None:
    """Readers may use the checksum in the directory, or the one before or after the bytes."""
    torch_writer.save_torch_file(MANY, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as zipped:
        assert zipped.testzip() is None
        for entry in zipped.infolist():
            assert zlib.crc32(zipped.read(entry)) == entry.CRC
            crc, _, _, n_name, n_extra = struct.unpack_from("<14xIII2H", whole, entry.header_offset)
            if entry.flag_bits & 8:
                end = entry.header_offset + 30 + n_name + n_extra + entry.file_size
                signature, crc = struct.unpack_from("<4sI", whole, end)
                assert signature == b"PK\7\x08"
            assert crc == entry.CRC
    assert not list(differences(MANY, torch.load(path, weights_only=True, mmap=True)))
    assert not list(differences(MANY, read(path)))


def test_the_same_data_gives_the_same_bytes(path: Path) -> None:
    torch_writer.save_torch_file(MANY, path)
    torch_writer.save_torch_file(torch.load(path, weights_only=True), path.with_name("another.pt"))
    assert path.read_bytes() == path.with_name("another.pt").read_bytes()


def test_a_file_that_exists_is_not_overwritten(path: Path) -> None:
    torch_writer.save_torch_file(MANY, path)
    before = path.read_bytes()
    with pytest.raises(StorageError, match="exists"):
        torch_writer.save_torch_file({}, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("size", [100, 10**6], ids=["small", "large"])
def test_why_a_write_failed_is_said(
    path: Path, error: BaseException, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def failing(descriptor: int, data: Any, offset: int) -> int:
        if len(data) >= min(size, 2**17):
            raise error
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises((StorageError, KeyboardInterrupt)) as caught:
        torch_writer.save_torch_file({"w": torch.zeros(size)}, path)
    assert caught.value is error or "No space left" in str(caught.value)


class _Signalled(BaseException):
    """The exception that the signal handler raises."""


def signalled_at(line: int, work: Callable[[], object]) -> bool:
    """Do `work` with a signal before a line that runs in this package or torch; False if there are fewer."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (torch_writer.__file__, torch.serialization.__file__):
            return None
        left -= event == "line"
        if event == "line" and not left:
            sys.settrace(None)
            signal.raise_signal(signal.SIGTERM)
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return left <= 0


@pytest.mark.parametrize(
    "work", [torch_writer.save_torch_file, lambda value, _: torch_writer.torch_file_size(value)], ids=["save", "size"]
)
def test_a_signal_at_any_line_of_a_write_is_raised_and_not_an_error_of_torch(
    path: Path, work: Callable[[Any, Path], object]
) -> None:
    def stop(*_: object) -> None:
        raise _Signalled

    usual = signal.signal(signal.SIGTERM, stop)
    try:
        for line in count(1):
            path.unlink(missing_ok=True)
            try:
                if not signalled_at(line, lambda: work({"w": torch.arange(100), "large": MANY["large"]}, path)):
                    break
                pytest.fail(f"the signal at line {line} was lost")
            except _Signalled:
                pass
            assert signal.getsignal(signal.SIGTERM) is stop
            assert torch.serialization.get_crc32_options()
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert line > 40


# --- References ---


def test_every_storage_of_a_file_is_registered_with_its_checksum(path: Path) -> None:
    """Tensors that share a storage refer to the same bytes, and no others do."""
    for save in (torch.save, torch_writer.save_torch_file):
        save({"model": MANY, "more": [{"w": nn.Parameter(torch.ones(2))}]}, path.with_name(save.__module__))
        sources = Sources()
        value = referenced(torch_reader.load_torch_file(path.with_name(save.__module__), sources))
        (source,) = sources
        assert source.states_checksums
        assert sorted(part.nbytes for part in source.parts) == [0, 2, 4, 6, 8, 2**17 + 3, 800_000]
        assert [part.start for part in source.parts] == sorted(part.start for part in source.parts)
        whole = source.path.read_bytes()
        for part in source.parts:
            assert part.crc == zlib.crc32(whole[part.start : part.start + part.nbytes])
            assert part.file is source
            assert not part.proven
        assert value["model"]["view"].storage is value["model"]["large"].storage
        held = {id(ref.storage) for _, ref in plain_data.named_references(value)}
        assert held == {id(part) for part in source.parts}


def test_a_flipped_bit_is_found_by_the_checksum_of_its_storage(path: Path) -> None:
    torch_writer.save_torch_file(MANY, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(MANY["large"].numpy().tobytes()) + 100_000] ^= 1
    path.write_bytes(whole)
    sources = Sources()
    torch_reader.load_torch_file(path, sources)
    with pytest.raises(CorruptError, match="checksum") as caught:
        sources.verify()
    assert caught.value.key == "archive/data/0"
    assert [part.name for source in sources for part in source.parts if not part.proven] == ["archive/data/0"]


def test_reading_imports_no_torch() -> None:
    code = "import sys; from pathlib import Path; from vraxion_ckpt.formats.torch_reader import load_torch_references; "
    code += "from vraxion_ckpt.checkpoint.source_files import Sources; "
    code += "load_torch_references(Path(sys.argv[1]), Sources()); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, DATA / "named_experts3.pt"], check=True)


@pytest.mark.parametrize("target", ["new.pt", "new/"])
@pytest.mark.parametrize("optimizer", ["keep", "drop"])
@pytest.mark.parametrize("part", ["model", "optim"])
def test_a_damaged_source_is_blamed_whether_or_not_the_damage_would_have_been_carried(
    tmp_path: Path, target: str, optimizer: str, part: str
) -> None:
    whole = bytearray((DATA / "named_experts3.pt").read_bytes())
    payload = torch.load(io.BytesIO(whole), weights_only=True)
    slots = next(slots for slots in payload["optim"]["state"].values() if slots["exp_avg"].numel() > 8)
    hurt = slots["exp_avg"] if part == "optim" else next(w for w in payload["model"].values() if w.numel() > 99)
    whole[whole.index(hurt.numpy().tobytes()) + 1] ^= 1
    (tmp_path / "old.pt").write_bytes(whole)
    with pytest.raises(CorruptError, match="checksum") as caught:
        vc.convert(tmp_path / "old.pt", f"{tmp_path}/{target}", optimizer=optimizer)
    assert caught.value.path == tmp_path / "old.pt"
    assert [p.name for p in tmp_path.iterdir()] == ["old.pt"]


@pytest.mark.parametrize(("damage", "error"), [("bytes", InvariantError), ("checksum", CorruptError)])
def test_a_result_that_is_not_what_was_to_be_written_is_never_published(
    tmp_path: Path, damage: str, error: type[CkptError], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch_writer.save_torch_file

    def save_badly(value: Any, path: Path) -> None:
        save(value, path)
        member = next(m for m in torch_archive.check_archive(path).storages.values() if m.size > 100)
        whole = bytearray(path.read_bytes())
        in_the_directory = whole.rindex(struct.pack("<I", member.crc))
        whole[member.start + 1 if damage == "bytes" else in_the_directory] ^= 1
        path.write_bytes(whole)

    monkeypatch.setattr("vraxion_ckpt_adapters.pt.save_torch_file", save_badly)
    with pytest.raises(error):
        vc.convert(DATA / "named_experts3.pt", tmp_path / "new.pt")
    assert not list(tmp_path.iterdir())


# --- Compared ---


def test_tensors_are_the_same_if_all_their_bits_are() -> None:
    for size in (0, 1, 7, 8, 9, 16, 31):
        a = torch.arange(size, dtype=torch.uint8)
        assert same_bits(a, a.clone())
        for place in range(size):
            b = a.clone()
            b[place] ^= 128
            assert not same_bits(a, b)


def test_what_only_equals_a_tensor_is_not_the_same() -> None:
    w = torch.tensor([[0.0, float("nan")], [1.0, 2.0]])
    other_nan = torch.frombuffer(bytearray(struct.pack("<fIff", 0, 0x7FC00001, 1, 2)), dtype=torch.float32).view(2, 2)
    for a, b, same in [
        (w, w.clone(), True),
        (w, w.t().clone().t(), True),
        (w, other_nan, False),
        (torch.zeros(2), -torch.zeros(2), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2), torch.ones(2, 1), False),
        (torch.ones(2), nn.Parameter(torch.ones(2)), False),
        (torch.ones(2), torch.ones(2, requires_grad=True), False),
    ]:
        assert same_bits(a, b) is same


@pytest.mark.parametrize("where", ["nowhere", "core", "transposed", "payload", "history"])
def test_a_change_of_any_part_of_a_checkpoint_is_found(where: str) -> None:
    def checkpoint(changed: str) -> Checkpoint:
        flip = {name: float(changed == name) for name in ("core", "transposed", "payload")}
        tensors = {f"w{i}": torch.full((100,), float(i)) for i in range(20)}
        tensors["w7"][99] += flip["core"]
        tensors["t"] = torch.arange(6.0).reshape(2, 3).t() + 0
        tensors["t"][2, 1] += flip["transposed"]
        assert not tensors["t"].is_contiguous()
        made = Checkpoint(tensors, payload={"losses": [1.0, 2.0 + flip["payload"]], "ema": {"w": torch.ones(3)}})
        return made if changed != "history" else replace(made, history=(Record("x", {}, "", "", "", ""),))

    a, b = checkpoint("nowhere"), checkpoint(where)
    assert len(list(checkpoint_differences(a, b))) == (where != "nowhere")


def test_a_conversion_reads_no_large_tensor_once_more_to_verify_its_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_again: list[str] = []

    def checksums(descriptor: int, ranges: Sequence[tuple[int, int]], path: Path) -> list[int]:
        read_again.extend(f"{path.name} {start}" for start, size in ranges if size > 1000)
        return original(descriptor, ranges, path)

    original = source_files.checksums_of_ranges
    torch.save(
        {"model": {"a": torch.rand(1000), "b": torch.rand(10, 100)}, "ema": [torch.rand(500)]}, tmp_path / "a.pt"
    )
    monkeypatch.setattr(source_files, "checksums_of_ranges", checksums)
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt")
    assert not read_again
    vc.convert(tmp_path / "a.pt", tmp_path / "c.pt", dry_run=True)
    assert len(read_again) == 3  # without a comparison, nothing else reads the bytes
