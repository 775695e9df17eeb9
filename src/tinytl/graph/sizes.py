"""Sizes of tensors as numbers that remember where they come from.

`x.shape[2]` in a traced forward is an ordinary int (code may branch on it, print it, index with it), and also an
expression: what is computed from it goes into the program as that expression. A comparison is decided by the number
at hand, and remembered as a check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .program import ARITHMETIC, Size

Frame = Any


class _Known:
    """What int and float below share: an expression, and the frame in which it means something."""

    expression: Size
    frame: Frame


def _make(value: Any, expression: Size, frame: Frame) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    known: Any = (KnownInt if isinstance(value, int) else KnownFloat)(value)
    known.expression, known.frame = expression, frame
    return known


def known(value: int, expression: Size, frame: Frame) -> Any:
    """`value` as an int that remembers `expression`."""
    return _make(value, expression, frame)


def _plain(value: Any) -> Any:
    if isinstance(value, KnownInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, KnownFloat) else value


def _apply(name: str, *args: Any) -> Any:
    numbers = [_plain(arg) for arg in args]
    if not all(isinstance(number, (int, float)) for number in numbers):
        return NotImplemented
    value = ARITHMETIC[name](*numbers)
    frame = next(arg.frame for arg in args if isinstance(arg, _Known))
    expressions = tuple(arg.expression if isinstance(arg, _Known) else arg for arg in args)
    if isinstance(value, bool):
        frame.check(name, expressions, value)
        return value
    return _make(value, Size(name, expressions), frame)


def _forward(name: str) -> Callable[..., Any]:
    return lambda self, other: _apply(name, self, other)


def _reflected(name: str) -> Callable[..., Any]:
    return lambda self, other: _apply(name, other, self)


_METHODS: dict[str, Any] = {
    **{f"__{name}__": _forward(name) for name in ("add", "sub", "mul", "floordiv", "truediv", "mod")},
    **{f"__r{name}__": _reflected(name) for name in ("add", "sub", "mul", "floordiv", "truediv", "mod")},
    **{f"__{name}__": _forward(name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "__neg__": lambda self: _apply("neg", self),
    "__ceil__": lambda self: _apply("ceil", self),
    "__floor__": lambda self: _apply("floor", self),
    "__round__": lambda self, digits=None: _apply("round", self) if digits is None else round(_plain(self), digits),
    "__bool__": lambda self: _apply("ne", self, 0),
    "__hash__": lambda self: hash(_plain(self)),
    "__reduce__": lambda self: (type(_plain(self)), (_plain(self),)),
    "__deepcopy__": lambda self, memo: self,
}

KnownInt: Any = type("KnownInt", (_Known, int), dict(_METHODS))
KnownFloat: Any = type("KnownFloat", (_Known, float), dict(_METHODS))
