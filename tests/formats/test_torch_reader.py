"""The reader of ``.pt`` files gives what torch gives, or refuses more."""

from __future__ import annotations

import pickletools
import struct
import tracemalloc
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hostile import FOUR, Entry, call, number, refused, tensor, text, write_pickle, zip_bytes
from pickle_dry_run import load_with_torch
from support import MONOLITHS, assert_same
from torch import nn
from torch._weights_only_unpickler import _get_allowed_globals

from vraxion_ckpt.checkpoint.source_files import Sources
from vraxion_ckpt.checkpoint.tensor_dict import resolved
from vraxion_ckpt.errors import (
    CkptError,
    CorruptError,
    InconsistentError,
    LimitError,
    UnsafeError,
    UnsupportedError,
)
from vraxion_ckpt.formats.stand_ins import StandIns
from vraxion_ckpt.formats.torch_reader import load_torch_file

LARGE = torch.arange(60.0).reshape(6, 10)
STATE = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)).state_dict()  # an OrderedDict with attributes
KINDS: dict[str, Any] = {
    "model": STATE,
    "views": [LARGE, LARGE[2:4].t(), LARGE[0, 0], LARGE[:, ::3], LARGE[1:1]],
    "parameters": (nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)),
    "gradients": torch.ones(3).requires_grad_(),
    "conjugated": torch.tensor([1j, 2]).conj(),
    "negative": torch.tensor([1j, 2]).conj().imag,
    "dtypes": {
        str(dtype): torch.zeros(3).to(dtype)
        for dtype in (
            *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16),
            *(torch.bfloat16, torch.float64, torch.complex64, torch.complex128, torch.uint16),
            *(torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
        )
    },
    "empty": [torch.zeros(0), torch.zeros(3, 0, 2)],
    "numbers": [0, -1, 255, 256, 65536, 2**31, -(2**40), 2**70, 0.5, float("nan"), float("-inf"), True, False, None],
    "texts": ["", "abc", "\u00e4\u4e2d", "x" * 300, "\ud800"],
    "bytes": [b"abc", bytes(range(256)), bytearray(b""), bytearray(b"\xff\0"), 1j, complex(-0.0, float("nan"))],
    "keys": {0.5: 1, None: 2, (): 3, (1, ("a",)): 4, True: 5, b"k": 6, 2**70: 7, torch.int8: 8},
    "sets": [set(), {1, "a", None, (2, "b")}, Counter({10: 1, "x": 2.5}), Counter()],
    "of torch": [
        torch.Size([2, 3]),
        torch.Size([]),
        torch.float32,
        torch.uint3,
        torch.device("cuda", 1),
        torch.strided,
    ],
    "others of torch": (torch.device("cpu"), torch.sparse_csr, torch.per_tensor_affine, torch.bits8),
    "nested": {1: {"a": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}]}, -5: OrderedDict(b=1)},
}
KINDS["again"] = [KINDS["views"], KINDS["nested"]]


def outcome(load: Any, path: Path) -> Any:
    """Return the value or the error of a reader."""
    try:
        return load(path)
    except CkptError as error:
        return error


def load(path: Path) -> Any:
    return resolved(load_torch_file(path, Sources()))


def compared(path: Path) -> str:
    """Read a file in both ways. Return how they compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = outcome(load, path), outcome(load_with_torch, path)
    if isinstance(theirs, CkptError):
        assert isinstance(ours, CkptError), theirs
        return "refused, same class" if type(ours) is type(theirs) else "refused, another class"
    if isinstance(ours, CkptError):
        return "refused only by us"
    assert_same(ours, theirs)
    return "read"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.pt"


@pytest.mark.parametrize("path", MONOLITHS, ids=lambda path: path.name)
def test_a_trainers_file_is_read_as_torch_reads_it(path: Path) -> None:
    assert compared(path) == "read"


def test_all_kinds_of_plain_data_are_read_as_torch_reads_them(path: Path) -> None:
    torch.save(KINDS, path)
    assert compared(path) == "read"


def test_every_name_that_torch_allows_has_a_stand_in() -> None:
    """If a torch release allows more, files that use it are refused until it has one."""
    assert not [name for name in _get_allowed_globals() if StandIns(0).find(name) is None]


def test_a_long_list_of_numbers_takes_memory_in_proportion_to_the_file(path: Path) -> None:
    torch.save({"losses": [0.5 + i for i in range(200_000)], "steps": list(range(10**6, 10**6 + 100_000))}, path)
    tracemalloc.start()
    try:
        value = load_torch_file(path, Sources())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(value["losses"]) == 200_000
    assert peak < 8 * path.stat().st_size  # a float takes 9 bytes in the file and 32 in memory


# --- Opcodes ---


MEMO = b"}" + text("a") + b"Nr" + struct.pack("<I", 2**31 - 1) + b"s"
ATTRIBUTES = call("collections.OrderedDict") + b"}" + text("items") + b"]sb"


@pytest.mark.parametrize(
    ("operations", "error", "match"),
    [
        (MEMO, LimitError, "memo of its pickle has large gaps"),
        (b"](N" + b"r\xff\0\0\0" * 3 + b"e", None, ""),
        (b"\x82\1", UnsupportedError, "torch.save does not write"),
        (b"](Nee", CorruptError, "pickle is damaged"),
        (b"]Na" + b"K\0" + b"Ns", CorruptError, "sets items of something other than a dict"),
        (b"}Na", CorruptError, "appends to something other than a list"),
        (b"})R", CorruptError, "calls something other than a named class"),
        (tensor((4,), (1,)) + b"}" + text("shape") + b"]sb", CorruptError, "changes the attributes"),
        (
            call("collections.OrderedDict") + b"}}\x86b",
            InconsistentError,
            "are not a dict",
        ),
        (ATTRIBUTES, InconsistentError, "hide methods"),
        (ATTRIBUTES.replace(b"items", b"other"), None, ""),
        (call("collections.OrderedDict") + b"(" + text("a") + b"Nu", None, ""),
        (b"ccollections\nOrderedDict\n)\x81", CorruptError, "pickle is damaged"),
        (b"cbuiltins\ncomplex\n)\x81", None, ""),
        (call("builtins.complex", text("1j")), CorruptError, "pickle is damaged"),
        (call("torch.device", text("tpu")), CorruptError, "no device"),
        (call("torch.device", text("cuda"), number(128)), CorruptError, "no device"),
        (call("torch.Size", b"(" + b"K\1" * 65 + b"t"), UnsupportedError, "torch.save does not write"),
        (call("torch.Size", b"(" + number(2**62) + b"t"), None, ""),
        (call("torch.serialization._get_layout", text("torch.round")), CorruptError, "no layout"),
        (call("builtins.set", b"](K\1G?\xf0\0\0\0\0\0\0e"), None, ""),
        (call("builtins.set", text("ab")), UnsupportedError, "torch.save does not write"),
        (call("collections.Counter", text("ab")), UnsupportedError, "torch.save does not write"),
        (call("collections.Counter", b"}") + b"}b", CorruptError, "changes the attributes"),
        (b"ctorch\nTensor\n)\x81", UnsafeError, "memory that is not in the file"),
        (b"ctorch\nfloat32\n", None, ""),
        (b"ctorch\ncontiguous_format\n", UnsafeError, r"torch\.contiguous_format"),
        (tensor((2**40, 2**40, 0), (1, 1, 1)), CorruptError, "torch cannot read it"),
        (tensor((4,), (1,)).replace(b"\x89", b"\x88"), None, ""),
        (tensor((4,), (1,)).replace(b"\x89", b"K\1"), CorruptError, "without a flag for gradients"),
        (tensor((4,), (1,)).replace(b"Float", b"Int").replace(b"\x89", b"\x88"), CorruptError, "requires gradients"),
        (
            b"(" + tensor((4,), (1,)) + tensor((4,), (1,)).replace(b"Float", b"Int") + b"t",
            CorruptError,
            "several dtypes",
        ),
    ],
)
def test_each_opcode_is_used_as_torch_uses_it_or_refused(
    path: Path, operations: bytes, error: type[CkptError] | None, match: str
) -> None:
    write_pickle(path, operations, FOUR)
    if error is not None:
        refused(path, error, match)
    else:
        assert compared(path) == "read"


# --- Names that the user allows ---


class Pair:
    """A class with attributes."""


def test_a_blocked_module_stays_blocked(path: Path) -> None:
    write_pickle(path, call("builtins.eval", text("1")))
    assert "do not load this file" in str(
        refused(path, UnsafeError, "module builtins is blocked", ["builtins.eval"]).hint
    )


def test_an_object_of_an_allowed_class_is_made_and_then_refused_as_not_plain(path: Path) -> None:
    pair = Pair()
    pair.x = 1  # type: ignore[attr-defined]
    torch.save({"pair": pair}, path)
    name = f"{Pair.__module__}.Pair"
    assert refused(path, UnsupportedError, rf"is a {name}", [name]).key == "pair"


def test_only_objects_of_allowed_classes_get_attributes(path: Path) -> None:
    write_pickle(path, call("copy.copy", b"cbuiltins\nset\n") + b"}" + text("x") + b"Nsb")
    refused(path, UnsafeError, "changes the attributes", ["copy.copy"])


# --- Changed pickles ---


def members(path: Path) -> list[Entry]:
    with zipfile.ZipFile(path) as zipped:
        return [Entry(name, zipped.read(name)) for name in zipped.namelist()]


def operations(pickled: bytes) -> list[bytes]:
    """Split a pickle into its opcodes with their arguments."""
    starts = [at for _, _, at in pickletools.genops(pickled)]
    return [pickled[start:end] for start, end in zip(starts, [*starts[1:], len(pickled)], strict=True)]


OTHERS = [
    *(code.encode("latin1") for code in ("}", "]", ")", "\x8f", "N", "\x88", "\x89", "(", "t", "\x85", "\x86", "\x87")),
    *(code.encode("latin1") for code in ("R", "\x81", "b", "a", "e", "s", "u", "Q", "0", "2", ".", "\x80\4")),
    *(b"K\0", b"K\1", b"K\7", b"M\0\1", b"J\xff\xff\xff\xff", b"J\0\0\0\x7f", b"G" + bytes(8), b"\x8a\1\xff", b"U\1a"),
    *(b"\x8a\x08" + struct.pack("<q", number) for number in (2**62, -(2**62), 2**48 + 1)),
    *(b"h\0", b"h\1", b"h\5", b"j" + struct.pack("<I", 300), b"q\0", b"q\xff", b"r\xff\xff\xff\x7f"),
    *(b"X" + struct.pack("<I", len(text)) + text for text in (b"", b"a", b"0", b"cpu", b"storage", b"latin1")),
    *(
        f"c{module}\n{name}\n".encode()
        for module, name in (name.rsplit(".", 1) for name in [*_get_allowed_globals(), "os.system", "builtins.eval"])
    ),
]


def changed(pickled: bytes, dice: Random) -> bytes:
    """Change some opcodes, or some bytes."""
    codes = operations(pickled)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        at = dice.randrange(len(codes))
        some = codes[at : at + dice.choice([1, 1, 2, 5, 20])]
        kind = dice.choice([*["like"] * 9, "drop", "double", "swap", "put", "insert", "move", "byte"])
        if kind == "like":  # keeps the structure, so that many are read
            codes[at] = dice.choice([code for code in [*codes, *OTHERS] if code[:1] == codes[at][:1]])
        elif kind == "drop":
            del codes[at : at + len(some)]
        elif kind == "double":
            codes[at:at] = some
        elif kind == "swap":
            other = dice.randrange(len(codes))
            codes[at], codes[other] = codes[other], codes[at]
        elif kind == "put":
            codes[at] = dice.choice(OTHERS)
        elif kind == "insert":
            codes.insert(at, dice.choice(OTHERS))
        elif kind == "move":
            to = dice.randrange(len(codes))
            codes[to:to] = some
        else:
            code = bytearray(codes[at])
            code[dice.randrange(len(code))] = dice.randrange(256)
            codes[at] = bytes(code)
    return b"".join(codes)


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_changed_pickle_is_read_as_torch_reads_it_or_refused(path: Path, number: int) -> None:
    torch.save(KINDS, path)
    originals = [members(path), *map(members, MONOLITHS)]
    torch.save({"w": torch.ones(2, 3), "o": STATE, "p": nn.Parameter(torch.ones(2)), "l": [1, (2, 0.5)]}, path)
    originals += [members(path)] * len(originals)  # half of the changes, because each change of a small one counts
    outcomes: Counter[str] = Counter()
    for seed in range(number):
        dice = Random(seed)
        entries = [Entry(entry.name, entry.data) for entry in dice.choice(originals)]
        for entry in entries:
            if entry.name.endswith("/data.pkl"):
                entry.data = changed(entry.data, dice)
        path.unlink(missing_ok=True)
        path.write_bytes(zip_bytes(entries))
        try:
            outcomes[compared(path)] += 1
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert outcomes["read"] > number / 20, outcomes
    assert outcomes["refused only by us"] < number / 50, outcomes
    assert outcomes["refused, same class"] > outcomes["refused, another class"], outcomes
