"""The stack machine behind ``array_pickle.py``: the instructions of pickle that arrays and plain containers need.

What it makes is bounded by what it reads: a memo is a dictionary, text is sliced from the file, and the bytes of arrays
are drawn from a budget.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_DIMENSIONS = 8
CODES = frozenset(["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])
"""Type codes of whole and floating-point numbers. Object arrays ('O') hold pickles of their own."""

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # the second since numpy 2
_GLOBALS = {
    **{(module, "_reconstruct"): "reconstruct" for module in _MULTIARRAY},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}
_PLAIN = (str, int, float, bool, type(None))


class RefusedError(Exception):
    """What is wrong with a pickle, for one line; ``read_array_pickle`` turns it into a WeightsError."""


class _Global:
    """A recognized name; nothing can be done with it but what ``_reduce`` does."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Dtype:
    """``numpy.dtype(code, False, True)``; its byte order follows."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "|"


class _Array:
    """What ``_reconstruct`` returns; its content follows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None


def loads(data: bytes) -> Any:
    """Run the pickle ``data``; see ``read_array_pickle``. Raises ``RefusedError``."""
    return _Machine(data).run()


class _Machine:
    """The stack machine. ``budget`` bounds the bytes that arrays and encoded text may take, all in all."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = 4 * len(data) + 1024

    def run(self) -> Any:
        while True:
            code = self.take(1)[0]
            if code == ord("."):
                break
            step = _STEPS.get(code)
            if step is None:
                raise RefusedError(
                    f"instruction {bytes([code])!r} at byte {self.at - 1}: not one that arrays are made with"
                )
            step(self)
        if self.at != len(self.data) or len(self.stack) != 1 or self.marks:
            raise RefusedError(f"does not end where its one value does (byte {self.at} of {len(self.data)})")
        return self.plain(self.stack[0])

    # -- input

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise RefusedError(f"cut off at byte {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, layout: str) -> str:
        try:
            return self.take(self.number(layout)).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise RefusedError(f"text before byte {self.at} is not UTF-8") from None

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 256)
        if end < 0:
            raise RefusedError(f"no name at byte {self.at}")
        raw = self.take(end + 1 - self.at)
        return raw[:-1].decode("ascii", "backslashreplace")

    # -- stack

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise RefusedError(f"takes a value that is not there at byte {self.at}")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise RefusedError(f"no mark at byte {self.at}")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_tuple(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def store(self, key: int) -> None:
        # A memo is a dictionary here, so that a large number allocates nothing.
        self.memo[key] = self.top()

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise RefusedError(f"memo {key} at byte {self.at} was never stored")
        self.push(self.memo[key])

    # -- containers

    def plain(self, value: Any) -> Any:
        """A value that may stand in a container: an array that is filled, a plain value, a short tuple, a container."""
        if isinstance(value, _Array):
            if value.value is None:
                raise RefusedError(f"an array before byte {self.at} has no content")
            return value.value
        if type(value) is tuple and len(value) <= MAX_DIMENSIONS and all(type(item) in _PLAIN for item in value):
            return value
        if type(value) in (*_PLAIN, dict, list):
            return value
        name = value.name if isinstance(value, _Global) else type(value).__name__.lstrip("_")
        raise RefusedError(f"{name} at byte {self.at} stands where an array or a plain value must")

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(values) % 2:
            raise RefusedError(f"entries at byte {self.at} belong to no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):
                raise RefusedError(f"a dictionary's key at byte {self.at} is neither text nor a whole number")
            target[key] = self.plain(value)

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise RefusedError(f"items at byte {self.at} belong to no list")
        target.extend(self.plain(value) for value in values)

    # -- the four names

    def push_global(self, module: Any, name: Any) -> None:
        known = _GLOBALS.get((module, name)) if type(module) is str and type(name) is str else None
        if known is None:
            asked = f"{module}.{name}"[:80] if type(module) is str and type(name) is str else "something unnamed"
            raise RefusedError(f"asks for {asked!r}: only arrays are read, nothing is imported or called")
        self.push(_Global(known))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push_global(module, name)

    def reduce(self) -> None:
        arguments, what = self.pop(), self.pop()
        if not isinstance(what, _Global) or type(arguments) is not tuple:
            raise RefusedError(f"calls something that is no function at byte {self.at}")
        if what.name == "reconstruct" and len(arguments) == 3:
            kind, shape, code = arguments
            if isinstance(kind, _Global) and kind.name == "ndarray" and _same(shape, (0,)) and _same(code, b"b"):
                return self.push(_Array())
        if what.name == "dtype" and len(arguments) == 3:
            code, align, copy = arguments
            if type(code) is str and code in CODES and align is False and copy is True:
                return self.push(_Dtype(code))
        if what.name == "encode" and len(arguments) == 2:
            text, codec = arguments
            if type(text) is str and _same(codec, "latin1"):
                return self.push(self.encoded(text))
        raise RefusedError(f"calls {what.name} with other arguments than a plain array's at byte {self.at}")

    def encoded(self, text: str) -> bytes:
        self.spend(len(text))
        try:
            return text.encode("latin1")
        except UnicodeEncodeError:
            raise RefusedError(f"an array's content before byte {self.at} is not bytes") from None

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, _Dtype) and type(state) is tuple and len(state) == 8:
            version, order, *rest = state
            if version == 3 and order in ("<", ">", "|", "=") and _same(tuple(rest), (None, None, None, -1, -1, 0)):
                target.order = order
                return
        if isinstance(target, _Array) and target.value is None and type(state) is tuple and len(state) == 5:
            target.value = self.array(*state)
            return
        raise RefusedError(f"sets a state that is no plain array's at byte {self.at}")

    def array(self, version: Any, shape: Any, dtype: Any, fortran: Any, content: Any) -> np.ndarray:
        sides = type(shape) is tuple and len(shape) <= MAX_DIMENSIONS and all(type(side) is int for side in shape)
        if not sides or min(shape, default=0) < 0 or version != 1:
            raise RefusedError(f"an array's shape before byte {self.at} is not one")
        if not isinstance(dtype, _Dtype) or type(fortran) is not bool or type(content) is not bytes:
            raise RefusedError(f"an array's state before byte {self.at} is not type, order and bytes")
        kind = np.dtype(dtype.order + dtype.code)
        if math.prod(shape) * kind.itemsize != len(content):
            raise RefusedError(f"an array {shape} of {kind} before byte {self.at} has {len(content)} bytes of content")
        self.spend(len(content))
        flat = np.frombuffer(content, kind).astype(kind.newbyteorder("="))
        return flat.reshape(shape, order="F" if fortran else "C")

    def spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise RefusedError("its arrays take more bytes than the file has")


def _same(value: Any, expected: Any) -> bool:
    """Equal in type and value, inside tuples too (True is not 1)."""
    if type(value) is tuple and type(expected) is tuple:
        return len(value) == len(expected) and all(_same(a, b) for a, b in zip(value, expected, strict=True))
    return type(value) is type(expected) and value == expected


def _long(machine: _Machine) -> int:
    raw = machine.take(machine.number("<B"))
    if len(raw) > 8:
        raise RefusedError(f"a whole number of {len(raw)} bytes at byte {machine.at}")
    return int.from_bytes(raw, "little", signed=True)


_STEPS: dict[int, Callable[[_Machine], Any]] = {
    ord(code): step
    for code, step in {
        "\x80": lambda m: m.take(1),  # PROTO
        "\x95": lambda m: m.take(8),  # FRAME
        "(": lambda m: m.marks.append(len(m.stack)),  # MARK
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "K": lambda m: m.push(m.number("<B")),  # BININT1
        "M": lambda m: m.push(m.number("<H")),  # BININT2
        "J": lambda m: m.push(m.number("<i")),  # BININT
        "\x8a": lambda m: m.push(_long(m)),  # LONG1
        "G": lambda m: m.push(m.number(">d")),  # BINFLOAT
        "X": lambda m: m.push(m.text("<I")),  # BINUNICODE
        "\x8c": lambda m: m.push(m.text("<B")),  # SHORT_BINUNICODE
        "B": lambda m: m.push(m.take(m.number("<I"))),  # BINBYTES
        "C": lambda m: m.push(m.take(m.number("<B"))),  # SHORT_BINBYTES
        "}": lambda m: m.push({}),
        "]": lambda m: m.push([]),
        ")": lambda m: m.push(()),
        "t": lambda m: m.push(tuple(m.since_mark())),
        "\x85": lambda m: m.push_tuple(1),
        "\x86": lambda m: m.push_tuple(2),
        "\x87": lambda m: m.push_tuple(3),
        "s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),  # SETITEM
        "u": lambda m: m.set_items(m.since_mark()),  # SETITEMS
        "a": lambda m: m.append([m.pop()]),
        "e": lambda m: m.append(m.since_mark()),
        "q": lambda m: m.store(m.number("<B")),  # BINPUT
        "r": lambda m: m.store(m.number("<I")),  # LONG_BINPUT
        "\x94": lambda m: m.store(len(m.memo)),  # MEMOIZE
        "h": lambda m: m.recall(m.number("<B")),  # BINGET
        "j": lambda m: m.recall(m.number("<I")),  # LONG_BINGET
        "c": lambda m: m.push_global(m.line(), m.line()),  # GLOBAL
        "\x93": lambda m: m.stack_global(),
        "R": lambda m: m.reduce(),
        "b": lambda m: m.build(),
    }.items()
}
"""Instructions of pickle protocols 2 to 4 that containers of plain values and arrays are written with."""
