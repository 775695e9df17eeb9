"""A part as text, and text as a part: what stands between the '+' of a method's name.

====================  ============================================================================================
text                  part
====================  ============================================================================================
bias, norm, full      Bias, Norm, Full
bias(0-3.7)           BlockBias((0, 1, 2, 3, 7)): numbers and ranges with dots between
lite-residual         LiteResidual(); lite-residual(k3g4) with kernel 3 and 4 groups
lite(1:k5g2.2:k3g4w50)  LiteModules(((1, 5, 2, 100), (2, 3, 4, 50))): block, kernel, groups, width in percent (100)
last-blocks(2)        LastBlocks(2)
====================  ============================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tinytl._ranges import spell_ranges
from tinytl.errors import InputError, UnknownNameError

from .parts import MAX_BLOCKS, Bias, BlockBias, Full, LastBlocks, LiteModules, LiteResidual, Norm, Part

FORMS: dict[str, str] = {
    "bias": "bias, or bias(0-3.7) for the blocks 0 to 3 and 7",
    "norm": "norm",
    "full": "full",
    "lite-residual": "lite-residual, or lite-residual(k3g4) for kernel 3 and 4 groups",
    "lite": "lite(1:k5g2.2:k3g4w50) for block 1 with kernel 5 and 2 groups, block 2 with 3 and 4 at 50 % of the width",
    "last-blocks": "last-blocks(2)",
}
"""Name of a part in a method's text -> how it is spelled."""

_PART = re.compile(r"([a-z-]+)(?:\(([^()]*)\))?")
# so many digits at most: Python reads no number of thousands of digits, and no network has so many of anything
_NUMBER = "([0-9]{1,9})"
_POSITIONS = re.compile(rf"{_NUMBER}(?:-{_NUMBER})?")
_KERNEL_GROUPS = re.compile(rf"k{_NUMBER}g{_NUMBER}")
_MODULE = re.compile(rf"([0-9-]+):k{_NUMBER}g{_NUMBER}(?:w{_NUMBER})?")
_PLAIN: dict[str, Part] = {"bias": Bias(), "norm": Norm(), "full": Full(), "lite-residual": LiteResidual()}


def spell(part: Part) -> str:
    """The text from which `read_part` makes an equal part."""
    plain = next((name for name, known in _PLAIN.items() if known == part), None)
    if plain is not None:
        return plain
    if isinstance(part, BlockBias):
        return f"bias({spell_ranges(part.blocks)})"
    if isinstance(part, LiteResidual):
        return f"lite-residual(k{part.kernel_size}g{part.groups})"
    if isinstance(part, LiteModules):
        words = (f"{at}:k{k}g{g}" + (f"w{width}" if width < 100 else "") for at, k, g, width in part.modules)
        return f"lite({'.'.join(words)})"
    assert isinstance(part, LastBlocks)
    return f"last-blocks({part.count})"


def read_part(text: str, known: Iterable[str] = (), kind: str = "method part") -> Part:
    """The part that a text spells.

    Args:
        text: without a '+'.
        known: names of other things that could stand in its place, for the message.
        kind: what the message calls an unknown name.

    Raises:
        UnknownNameError: no part of that name.
        InputError: what stands in its brackets cannot be read, or is no part.
    """
    match = _PART.fullmatch(text)
    name, inside = (match[1], match[2]) if match else (text.partition("(")[0], None)
    if name not in FORMS:
        raise UnknownNameError(kind, shortened(name), {*FORMS, *known})
    if match is not None and inside is None and name in _PLAIN:
        return _PLAIN[name]
    found = _read_inside(name, inside) if inside is not None else None
    if found is None:
        raise InputError(f"method part {shortened(text)!r} cannot be read: expected {FORMS[name]}")
    return found


def read_positions(text: str) -> tuple[int, ...] | None:
    """The numbers of a text such as '0-3.7', in its order; None if it cannot be read."""
    found: list[int] = []
    for word in text.split("."):
        match = _POSITIONS.fullmatch(word)
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= MAX_BLOCKS:  # a range is written out: not before its end is known to be near
            return None
        found += range(first, last + 1)
    return tuple(found)


def _read_inside(name: str, inside: str) -> Part | None:
    """The part of that name with what stands in its brackets; None if it cannot be read."""
    if name == "bias":
        positions = read_positions(inside)
        return None if positions is None else BlockBias(positions)
    if name == "lite-residual":
        match = _KERNEL_GROUPS.fullmatch(inside)
        return None if match is None else LiteResidual(int(match[1]), int(match[2]))
    if name == "last-blocks":
        match = re.fullmatch(_NUMBER, inside)
        return None if match is None else LastBlocks(int(match[1]))
    return _read_modules(inside) if name == "lite" else None


def _read_modules(inside: str) -> LiteModules | None:
    modules: list[tuple[int, int, int, int]] = []
    for word in inside.split("."):
        match = _MODULE.fullmatch(word)
        positions = None if match is None else read_positions(match[1])
        if match is None or positions is None:
            return None
        modules += [(at, int(match[2]), int(match[3]), int(match[4] or 100)) for at in positions]
    return LiteModules(tuple(modules))


def shortened(text: str) -> str:
    """A text for a message: its beginning, where it is long."""
    return text if len(text) <= 80 else f"{text[:77]}..."
