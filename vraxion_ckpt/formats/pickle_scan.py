"""Check the opcodes of the pickle of a ``.pt`` file before Python's unpickler runs it.

The scan makes no value. It follows the unpickler's stack with one byte per value: its kind, or the number of values in
a tuple. So it finds opcodes that allocate without limit, hash large tuples, or change objects other than dicts and
lists. Imports without torch.
"""

from __future__ import annotations

import pickle
import re
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial

from vraxion_ckpt.errors import InconsistentError, LimitError, UnsupportedError


def current_name(module: str, name: str) -> str:
    """Return the full name that Python 3 has for a class or function of a pickle."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


class _Kind(IntEnum):
    """What is known of a value on the stack."""

    TEXT = 0  # or None, a bool, or an integer of up to 32 bits: hashes of many of them differ
    OTHER = 1
    LIST = 2
    DICT = 3
    REPEATED_DICT = 4  # from the memo
    ORDERED_DICT = 5
    FUNCTION = 6  # a class or function that makes stand-ins
    ORDERED_DICT_CLASS = 7
    STATEFUL_FUNCTION = 8  # its results may get a state
    STATEFUL_RESULT = 9
    UNKNOWN = 10  # whatever is done with it has no effect


# From here on, a kind is a tuple: an empty one, one that holds one value, and so on. Values in tuples in it count too.
_EMPTY_TUPLE = 128
_LARGE_TUPLE = (
    255  # must not be hashed, because a small pickle can have tuples that take hours, or overflow the C stack
)
_TEXT_KIND, _OTHER, _LIST, _DICT, _ORDERED_DICT, _UNKNOWN = (
    int(kind) for kind in (_Kind.TEXT, _Kind.OTHER, _Kind.LIST, _Kind.DICT, _Kind.ORDERED_DICT, _Kind.UNKNOWN)
)
_IN_MEMO = bytes(_Kind.REPEATED_DICT if kind == _DICT else kind for kind in range(_LARGE_TUPLE + 1))
_SIZES = bytes(1 + max(0, kind - _EMPTY_TUPLE) for kind in range(_LARGE_TUPLE + 1))
_RESULTS: dict[int, int] = {
    _Kind.FUNCTION: _Kind.OTHER,
    _Kind.ORDERED_DICT_CLASS: _Kind.ORDERED_DICT,
    _Kind.STATEFUL_FUNCTION: _Kind.STATEFUL_RESULT,
    _Kind.UNKNOWN: _Kind.UNKNOWN,
}
_WITH_ITEMS = frozenset({_Kind.DICT, _Kind.REPEATED_DICT, _Kind.ORDERED_DICT, _Kind.UNKNOWN})
_WITH_STATE = frozenset({_Kind.ORDERED_DICT, _Kind.STATEFUL_RESULT, _Kind.UNKNOWN})

# Opcodes that push a value: the number of bytes of their argument, and the kind.
_PUSHES: dict[int, tuple[int, int]] = {
    **dict.fromkeys((pickle.NONE[0], pickle.NEWTRUE[0], pickle.NEWFALSE[0]), (0, _TEXT_KIND)),
    pickle.BININT[0]: (4, _TEXT_KIND),
    pickle.BININT1[0]: (1, _TEXT_KIND),
    pickle.BININT2[0]: (2, _TEXT_KIND),
    pickle.BINFLOAT[0]: (8, _OTHER),
    pickle.EMPTY_SET[0]: (0, _OTHER),
    pickle.EMPTY_TUPLE[0]: (0, _EMPTY_TUPLE),
    pickle.EMPTY_LIST[0]: (0, _LIST),
    pickle.EMPTY_DICT[0]: (0, _DICT),
}
_BINPUT, _TEXT = pickle.BINPUT[0], pickle.BINUNICODE[0]
_BINGET, _LONG_BINGET = pickle.BINGET[0], pickle.LONG_BINGET[0]
_MARK, _MANY, _STOP = pickle.MARK[0], pickle.TUPLE[0], pickle.STOP[0]
# Matches a run of numbers of one kind.
_RUNS = {
    code: re.compile(b"(?:%s[\\s\\S]{%d})+" % (re.escape(bytes([code])), _PUSHES[code][0])).match
    for code in (pickle.BINFLOAT[0], pickle.BININT[0], pickle.BININT1[0], pickle.BININT2[0])
}
_PUTS = frozenset({_BINPUT, pickle.LONG_BINPUT[0]})


def _tensor_opcodes() -> re.Pattern[bytes]:
    """Return a pattern of the opcodes that make a tensor, from the marks of its arguments to its place in the memo.

    ``torch.save`` writes them once the memo has 256 values. Each alternative begins with another opcode, so the bytes
    can match only as the unpickler reads them. The groups are the memo indices of values that are put there, and, named
    ``short`` or ``long``, that of the class that is called for the hooks.
    """
    number, get, put = rb"(?:K.|M..|J.{4})", rb"(?:h.|j.{4})", rb"r(.{4})"
    digits = b"|".join(rb"\x%02x\0{3}[0-9]{%d}" % (length, length) for length in range(1, 8))
    several = rb"%b\x85|%b{2}\x86|%b{3}\x87|\(%b+t" % (number, number, number, number)
    sizes = rb"(?:\)|(?:%b)%b)" % (several, put)
    parts = (
        *(rb"\(\(", get, get, rb"X(?:%b)" % digits, put, get, number, b"t", put, b"Q"),  # storage
        *(number, sizes, sizes, rb"[\x88\x89]"),  # first element, shape, strides, whether it requires gradients
        *(rb"(?:h(?P<short>.)|j(?P<long>.{4}))\)R", put),  # hooks
        *(b"t", put, b"R", put),
    )
    return re.compile(b"".join(parts), re.DOTALL)


_TENSOR = _tensor_opcodes().match
_CALLABLE = bytes([_Kind.FUNCTION])
# The kinds of the values that these opcodes put into the memo, by their number: the key of the storage, tuples, the
# hooks, the tuple of all arguments, the tensor. The tuples are arguments of functions, so they are never keys, and need
# not be measured. And how their indices are written.
_IN_TENSOR = {
    count: bytes([_TEXT_KIND, *[_LARGE_TUPLE] * (count - 4), _ORDERED_DICT, _LARGE_TUPLE, _OTHER])
    for count in range(5, 8)
}
_INDICES = {count: struct.Struct(f"<{count}I") for count in _IN_TENSOR}
_OPCODES = frozenset(pickle._Unpickler.dispatch)
_LONG = struct.Struct("<I").unpack_from
ORDERED_DICT = "collections.OrderedDict"
_MOST_UNUSED = 256  # memo indices that a pickle may leave out; Python 2 begins with 1


class _TupleAsKeyError(Exception):
    """A tuple is a key, so the values in tuples must be counted."""


def _tuple_of(kinds: bytearray) -> int:
    """Return the kind of a tuple of values of some kinds."""
    return min(_EMPTY_TUPLE + sum(kinds.translate(_SIZES)), _LARGE_TUPLE)


def scan_pickle(data: bytes, known: Callable[[str], object], stateful: Collection[str] = ()) -> PickleScan:
    """Return the scan of a pickle, after `PickleScan.run`. Takes the same arguments, and raises the same errors."""
    scan = PickleScan(data, known, stateful)
    try:
        scan.run()
    except _TupleAsKeyError:
        scan = PickleScan(data, known, stateful, counts_values=True)
        scan.run()
    return scan


def _wrong_opcode(code: int) -> Exception:
    if code in _OPCODES:
        return UnsupportedError("its pickle has opcodes that torch.save does not write by default")
    return pickle.UnpicklingError(f"there is no opcode {code:#x}")


@dataclass
class PickleScan:
    """A scan of one pickle, without running it.

    Args:
        data: the pickle.
        known: returns something other than None for the full name of a class or function that has a stand-in.
        stateful: full names of further classes and functions, whose results may get a state.
        counts_values: whether to count the values in each tuple, so that tuples may be keys. This takes time.

    Attributes:
        unknown: full names of all other classes and functions in the pickle, after `run`.
        odd_keys: number of keys of dicts whose hashes could all be the same.
    """

    data: bytes
    known: Callable[[str], object]
    stateful: Collection[str] = ()
    counts_values: bool = False
    unknown: set[str] = field(default_factory=set)
    odd_keys: int = 0
    _stack: bytearray = field(default_factory=bytearray)
    _marks: list[int] = field(default_factory=list)
    _memo: bytearray = field(default_factory=bytearray)
    _gaps: int = 0

    def run(self) -> None:
        """Follow all opcodes up to the end of the pickle.

        The scan need not notice that the stack is too short, because the unpickler then stops at the same opcode.

        Raises:
            UnsupportedError: there is an opcode that ``torch.save`` does not write.
            InconsistentError: the attributes of an OrderedDict are not a dict.
            LimitError: a dict is copied repeatedly, or a key is a tuple of very many values.
            pickle.UnpicklingError: the pickle is damaged, or uses something other than a dict, list or function as one.
            _TupleAsKeyError: a tuple is a key, but values in tuples are not counted.
        """
        try:
            self._run()
        except (IndexError, ValueError, struct.error):
            raise pickle.UnpicklingError("it ends too early, or takes values that it did not make") from None

    def _run(self) -> None:
        data, stack, memo, push, others = self.data, self._stack, self._memo, _PUSHES.get, self._others()
        at = 0
        while True:  # the order of the cases is by how frequent they are
            code = data[at]
            at += 1
            if code in _PUTS:
                if code == _BINPUT:
                    index = data[at]
                    at += 1
                else:
                    (index,) = _LONG(data, at)
                    at += 4
                if index == len(memo):
                    memo.append(_IN_MEMO[stack[-1]])
                else:
                    self._put(index)
            elif pushed := push(code):
                at += pushed[0]
                stack.append(pushed[1])
                if data[at] == code and code in _RUNS:  # a list of numbers
                    end = _RUNS[code](data, at).end()  # type: ignore[union-attr]
                    stack += bytes([pushed[1]]) * ((end - at) // (pushed[0] + 1))
                    at = end
            elif code == _BINGET:
                stack.append(memo[data[at]])
                at += 1
            elif code == _TEXT:
                at += 4 + _LONG(data, at)[0]
                stack.append(_TEXT_KIND)
            elif code == _LONG_BINGET:
                stack.append(memo[_LONG(data, at)[0]])
                at += 4
            elif code == _MARK:
                if data[at] == _MARK and (end := self._tensor(at - 1)):
                    at = end
                else:
                    self._marks.append(len(stack))
            elif code == _MANY:
                start = self._marks.pop()
                kind = _tuple_of(stack[start:]) if self.counts_values else _LARGE_TUPLE
                del stack[start:]
                stack.append(kind)
            elif code in others:
                at = others[code](at)
            elif code == _STOP:
                return
            else:
                raise _wrong_opcode(code)

    def _others(self) -> dict[int, Callable[[int], int]]:
        """Return a method for each of the less frequent opcodes. It takes and returns an offset in the pickle."""
        return {
            pickle.TUPLE1[0]: partial(self._tuple, 1),
            pickle.TUPLE2[0]: partial(self._tuple, 2),
            pickle.TUPLE3[0]: partial(self._tuple, 3),
            pickle.BINPERSID[0]: self._persistent,
            pickle.REDUCE[0]: self._call,
            pickle.NEWOBJ[0]: self._call,
            pickle.GLOBAL[0]: self._global,
            pickle.BUILD[0]: self._build,
            pickle.APPEND[0]: self._append,
            pickle.APPENDS[0]: self._extend,
            pickle.SETITEM[0]: self._set_item,
            pickle.SETITEMS[0]: self._set_items,
            pickle.PROTO[0]: lambda at: at + 1,
            pickle.LONG1[0]: self._counted,
            pickle.SHORT_BINSTRING[0]: self._counted,
        }

    def _tensor(self, at: int) -> int:
        """Follow the opcodes that make a tensor at once, which is faster than one by one, with the same effect.

        Returns:
            the offset after them; 0 if there are other opcodes, or if they could be refused.
        """
        found = _TENSOR(self.data, at) if self._stack[-1:] == _CALLABLE else None
        if found is None:
            return 0
        memo = self._memo
        *before, short, long, hooks, arguments, tensor = found.groups()
        puts = b"".join(filter(None, (*before, hooks, arguments, tensor)))  # a shape without dimensions is not put
        start, end = len(memo), len(memo) + len(puts) // 4
        is_made = memo[int.from_bytes(short or long, "little")] == _Kind.ORDERED_DICT_CLASS
        if not is_made or puts != _INDICES[end - start].pack(*range(start, end)):
            return 0
        memo += _IN_TENSOR[end - start]
        self._stack[-1] = _OTHER
        return found.end()

    def _put(self, index: int) -> None:
        # The unpickler allocates memory for all indices up to the largest one.
        gap = max(0, index - len(self._memo))
        self._gaps += gap
        if self._gaps > _MOST_UNUSED:
            raise LimitError("the memo of its pickle has large gaps, which would take much memory")
        self._memo.extend(bytes(gap))
        self._memo[index : index + 1] = bytes([_IN_MEMO[self._stack[-1]]])

    def _tuple(self, size: int, at: int) -> int:
        stack = self._stack
        kind = _tuple_of(stack[-size:]) if self.counts_values else _LARGE_TUPLE
        del stack[-size:]
        stack.append(kind)
        return at

    def _counted(self, at: int) -> int:
        self._stack.append(_OTHER)  # an integer of any size, or text
        return at + 1 + self.data[at]

    def _persistent(self, at: int) -> int:
        self._stack[-1] = _OTHER
        return at

    def _global(self, at: int) -> int:
        middle = self.data.index(b"\n", at)
        end = self.data.index(b"\n", middle + 1)
        name = current_name(self.data[at:middle].decode(), self.data[middle + 1 : end].decode())
        self._stack.append(self._kind_of(name))
        return end + 1

    def _kind_of(self, name: str) -> int:
        if name == ORDERED_DICT:
            return _Kind.ORDERED_DICT_CLASS
        if name in self.stateful:
            return _Kind.STATEFUL_FUNCTION
        if self.known(name) is not None:
            return _Kind.FUNCTION
        self.unknown.add(name)
        return _UNKNOWN

    def _call(self, at: int) -> int:
        self._stack.pop()
        if self._stack[-1] not in _RESULTS:
            raise pickle.UnpicklingError("it calls something other than a named class or function")
        self._stack[-1] = _RESULTS[self._stack[-1]]
        return at

    def _build(self, at: int) -> int:
        state, target = self._stack.pop(), self._stack[-1]
        if target not in _WITH_STATE:
            raise pickle.UnpicklingError("it changes the attributes of something other than an OrderedDict")
        if target == _ORDERED_DICT and state == _Kind.REPEATED_DICT:
            raise LimitError("its pickle copies far more data than it has: a dict is the attributes of many objects")
        if target == _ORDERED_DICT and state != _DICT:
            raise InconsistentError("attributes of an OrderedDict are not a dict; pairs could have a key of type tuple")
        return at

    def _append(self, at: int) -> int:
        self._stack.pop()
        return self._extended(at)

    def _extend(self, at: int) -> int:
        del self._stack[self._marks.pop() :]
        return self._extended(at)

    def _extended(self, at: int) -> int:
        if self._stack[-1] not in (_LIST, _UNKNOWN):
            raise pickle.UnpicklingError("it appends to something other than a list")
        return at

    def _set_item(self, at: int) -> int:
        return self._set(len(self._stack) - 2, at)

    def _set_items(self, at: int) -> int:
        return self._set(self._marks.pop(), at)

    def _set(self, start: int, at: int) -> int:
        keys = self._stack[start::2]
        if keys.count(_TEXT_KIND) != len(keys):
            if max(keys) >= _EMPTY_TUPLE and not self.counts_values:
                raise _TupleAsKeyError
            if _LARGE_TUPLE in keys:
                raise LimitError("has a key that is a tuple of more than a hundred values")
            self.odd_keys += len(keys) - keys.count(_TEXT_KIND)
        del self._stack[start:]
        if self._stack[-1] not in _WITH_ITEMS:
            raise pickle.UnpicklingError("it sets items of something other than a dict")
        return at
