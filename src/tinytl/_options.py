"""Options described once: a dataclass's field is the command line's option, the configuration file's key, the document.

    @dataclass(frozen=True)
    class Knobs:
        epochs: int = option(50, "Passes over the photographs.", least=1)

        def __post_init__(self) -> None:
            check_all(self)

`options_of(Knobs)` then tells each option's name, kind, default and help, from which the rest is made: `parse` reads
the command line's text, `check` refuses a value of another type or out of range with one line. Nothing here imports
PyTorch: the command line's help and completion answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tinytl.errors import InputError, UnknownNameError

T = TypeVar("T")
Kind = Literal["int", "float", "bool", "str", "bytes"]

# how a value that is not given is spelled where something must stand
NONE = "none"
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: the field's; on the command line with dashes.
        kind: of its value; 'bytes' is an int that may be written with a unit (``256MB``).
        default: what it is where it is not given; `dataclasses.MISSING`: it must be given.
        help: one line.
        optional: whether None is a value.
        least, above, most, below: the range of a number.
        names: the texts that are allowed; empty: any.
        choices: the numbers that are allowed; empty: any in the range.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    optional: bool = False
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    names: tuple[str, ...] = ()
    choices: tuple[int, ...] = ()

    @property
    def flag(self) -> str:
        """The name as the command line spells it: ``--batch-size``."""
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        """What a value must be, for an error's text."""
        ends = [
            f"{word} {_number(end)}"
            for word, end in (
                ("of at least", self.least),
                ("above", self.above),
                ("at most", self.most),
                ("below", self.below),
            )
            if end is not None
        ]
        if self.choices:
            return " or ".join(str(choice) for choice in self.choices)
        what = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "str": "a text",
            "bytes": "a number of bytes or a size such as 256MB",
        }[self.kind]
        return " ".join([what, " and ".join(ends)]).rstrip() + (f", or {NONE}" if self.optional else "")


def option(default: Any = dataclasses.MISSING, help: str = "", **about: Any) -> Any:
    """Describe a dataclass's field; ``about`` are `Option`'s ranges and names."""
    return dataclasses.field(default=default, metadata={"option": {"help": help, **about}})


@functools.cache
def options_of(kind: type) -> tuple[Option, ...]:
    """The options that a dataclass's fields are, in order."""
    hints = typing.get_type_hints(kind)
    return tuple(
        _option(field.name, hints[field.name], field.default, field.metadata["option"])
        for field in dataclasses.fields(kind)
        if "option" in field.metadata
    )


def documented(kind: type[T]) -> type[T]:
    """Add the options to a dataclass's docstring, as its attributes."""
    lines = [f"        {entry.name}: {entry.help}" for entry in options_of(kind)]
    kind.__doc__ = (kind.__doc__ or "").rstrip() + "\n\n    Attributes:\n" + "\n".join(lines) + "\n"
    return kind


def check_all(instance: Any) -> None:
    """Check every option of a dataclass instance. Raises InputError for the first that cannot be."""
    for entry in options_of(type(instance)):
        check(entry, getattr(instance, entry.name))


def check(entry: Option, value: object) -> None:
    """Raise InputError, or UnknownNameError, unless ``value`` can be that option's."""
    if value is None and entry.optional:
        return
    if entry.kind == "bytes":
        number_of_bytes(entry.name, value)
        return
    fits = {"int": _is_whole, "float": _is_number, "bool": _is_bool, "str": _is_text}[entry.kind]
    if not fits(value) or (entry.kind in ("int", "float") and not _in_range(entry, value)):
        raise InputError(f"{entry.name} is {value!r}, expected {entry.expected}")
    if entry.names and value not in entry.names:
        raise UnknownNameError(entry.name, str(value), entry.names)


def parse(entry: Option, text: str | bool) -> Any:
    """Read a value as it is typed on a command line; the result passes `check`.

    Raises InputError, naming the option, when it cannot be one.
    """
    value: Any = text
    if isinstance(text, str) and entry.optional and text.strip().lower() == NONE:
        return None
    try:
        if isinstance(text, bool):
            pass
        elif entry.kind == "int":
            value = int(text)
        elif entry.kind == "float":
            value = float(text)
        elif entry.kind == "bool":
            value = _WORDS[text.lower()]
    except (ValueError, KeyError):
        value = text  # the check below says what was expected
    check(entry, value)
    return value


def number_of_bytes(name: str, value: object) -> int:
    """Return a size as a number of bytes: an int, or a text such as ``256MB`` (10^6 bytes) or ``1.5 GiB`` (2^30).

    Raises InputError, naming ``name``, for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    text = value.strip().lower() if isinstance(value, str) else ""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?([a-z]*)", text, re.ASCII)
    if found is not None and found[2] in _UNITS and not ("." in found[1] and _UNITS[found[2]] == 1):
        whole, _, part = found[1].partition(".")
        return int(whole + part) * _UNITS[found[2]] // 10 ** len(part)
    raise InputError(f"{name} is {value!r}, expected a number of bytes or a size such as 256MB or 1GiB")


def near(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name, ready to stand before a list of them; empty where none is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}? " if found else ""


def _option(name: str, hint: Any, default: Any, about: dict[str, Any]) -> Option:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [part for part in parts if part is not type(None)]
    kind = "bytes" if set(kinds) == {int, str} else kinds[0].__name__
    if kind not in typing.get_args(Kind) or (len(kinds) > 1 and kind != "bytes"):
        raise TypeError(f"{name}: {hint} is no kind of option")
    return Option(name, kind, default, optional=type(None) in parts, **about)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _in_range(entry: Option, value: Any) -> bool:
    return (
        (not entry.choices or value in entry.choices)
        and (entry.least is None or value >= entry.least)
        and (entry.above is None or value > entry.above)
        and (entry.most is None or value <= entry.most)
        and (entry.below is None or value < entry.below)
    )


def _number(value: float) -> str:
    return "2**63" if value == 2**63 else f"{value:g}"
