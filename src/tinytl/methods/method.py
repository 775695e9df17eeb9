"""A fine-tuning method is a sum of parts; each part says one thing about what trains.

    >>> TINYTL_LB == Bias() + LiteResidual()
    True
    >>> (Bias() + LastBlocks(2)).name
    'tinytl-b+last-blocks(2)'
    >>> method("bias(0-1)+lite(1:k3g4)") == BlockBias((0, 1)) + LiteModules(((1, 3, 4, 100),))
    True

A method's name says all that it is: `method` makes an equal one of it. The classifier trains in every method. Names and
contents follow the paper (NeurIPS 2020, section 4 and table 2).
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from tinytl.errors import InputError, UnknownNameError

from ._text import read_part, shortened, spell
from .parts import Bias, BlockBias, Full, LastBlocks, LiteModules, LiteResidual, Norm, Part

_PARTS: dict[str, type[Part]] = {
    "bias": Bias,
    "block-bias": BlockBias,
    "norm": Norm,
    "full": Full,
    "lite-residual": LiteResidual,
    "lite-modules": LiteModules,
    "last-blocks": LastBlocks,
}
"""Names of the parts in JSON, in the order in which a method's name has them."""

_EXCLUSIVE = ((Bias, BlockBias), (LiteResidual, LiteModules))


@dataclass(frozen=True)
class Method:
    """What trains, beside the classifier: a set of parts, at most one of a kind. Parts that say nothing are left out.

    Raises:
        InputError: two parts of one kind that differ, or of two kinds that exclude each other (the biases of all
            blocks and of some, lite modules beside all and beside some).
    """

    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        for part in self.parts:
            if type(part) not in _PARTS.values():
                raise InputError(
                    f"method part {part!r}: expected one of {', '.join(k.__name__ for k in _PARTS.values())}"
                )
        object.__setattr__(self, "parts", tuple(part for part in self.parts if not part.is_empty))
        kinds = [type(part) for part in self.parts]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise InputError(f"method has two parts of kind {kind.__name__}: expected one of a kind")
        for all_blocks, some in _EXCLUSIVE:
            if all_blocks in kinds and some in kinds:
                one, other = (shortened(spell(part)) for part in self.parts if isinstance(part, (all_blocks, some)))
                raise InputError(f"method has {one} and {other}: expected one of the two")

    def __add__(self, other: Part | Method) -> Method:
        more = other.parts if isinstance(other, Method) else (other,)
        return Method(self.parts + tuple(part for part in more if part not in self.parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Method) and set(self.parts) == set(other.parts)

    def __hash__(self) -> int:
        return hash(frozenset(self.parts))

    @property
    def name(self) -> str:
        """The name in `METHODS` if it has one (last blocks aside), else the texts of its parts with '+' between.

        Equal methods have equal names, and `method(name)` is the method again.
        """
        last = self.part(LastBlocks)
        rest = Method(tuple(part for part in self.parts if part is not last))
        known = next((name for name, method in METHODS.items() if method == rest), None)
        order = list(_PARTS.values())
        named = [known] if known else [spell(part) for part in sorted(rest.parts, key=lambda p: order.index(type(p)))]
        if last is None:
            return "+".join(named)
        return spell(last) if known == "ft-last" else "+".join([*named, spell(last)])

    def part(self, kind: type[Part]) -> Any:
        """The part of that kind, or None."""
        return next((part for part in self.parts if type(part) is kind), None)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data from which `from_json` makes an equal method."""
        names = {kind: name for name, kind in _PARTS.items()}
        return [
            {"part": names[type(part)], **{key: _plain(value) for key, value in asdict(part).items()}}
            for part in self.parts
        ]

    @staticmethod
    def from_json(data: Any) -> Method:
        """The reverse of `to_json`.

        Raises:
            InputError: data of another form, or an unknown part or knob.
        """
        if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
            raise InputError(f"method {data!r}: expected a list of parts as written by Method.to_json")
        parts = []
        for entry in data:
            name = entry.get("part")
            kind = _PARTS.get(name) if isinstance(name, str) else None
            if kind is None:
                raise UnknownNameError("method part", str(name), _PARTS)
            parts.append(_part(kind, {key: value for key, value in entry.items() if key != "part"}))
        return Method(tuple(parts))


def _plain(knob: Any) -> Any:
    """A knob as JSON has it: lists in the place of tuples."""
    return [_plain(value) for value in knob] if isinstance(knob, tuple) else knob


def _part(kind: type[Part], knobs: dict[str, Any]) -> Part:
    """The part of that kind with the knobs that JSON gives; the others take their defaults."""
    known = {field.name: field for field in fields(kind)}
    needed = {name for name, field in known.items() if field.default is MISSING}
    if not needed <= set(knobs) <= set(known) or not all(_TYPES[kind](value) for value in knobs.values()):
        what = _EXPECTED.get(kind, "whole numbers")
        raise InputError(f"method part {kind.__name__} of {str(knobs)[:80]}: expected {what} for {sorted(known)}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in knobs.items()})


def _is_whole(value: Any) -> bool:
    return type(value) is int  # True is one to isinstance


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _are_fours(value: Any) -> bool:
    return isinstance(value, list) and all(_are_whole(entry) and len(entry) == 4 for entry in value)


_TYPES = dict.fromkeys(_PARTS.values(), _is_whole) | {BlockBias: _are_whole, LiteModules: _are_fours}
_EXPECTED = {BlockBias: "a list of whole numbers", LiteModules: "a list of lists of four whole numbers"}


FT_LAST = Method()
FT_NORM_LAST = Method((Norm(),))
FT_FULL = Method((Full(),))
TINYTL_B = Method((Bias(),))
TINYTL_L = Method((LiteResidual(),))
TINYTL_LB = Method((Bias(), LiteResidual()))

METHODS: dict[str, Method] = {
    "ft-last": FT_LAST,
    "ft-norm+last": FT_NORM_LAST,
    "ft-full": FT_FULL,
    "tinytl-b": TINYTL_B,
    "tinytl-l": TINYTL_L,
    "tinytl-l+b": TINYTL_LB,
}

DESCRIPTIONS: dict[str, str] = {
    "ft-last": "the classifier alone",
    "ft-norm+last": "scale and shift of every normalization, and the classifier",
    "ft-full": "every weight (batch-norm statistics stay frozen)",
    "tinytl-b": "every bias, and the classifier",
    "tinytl-l": "lite residual modules, and the classifier",
    "tinytl-l+b": "lite residual modules, every bias, and the classifier",
}


def method(name: str, *, last_blocks: int = 0) -> Method:
    """The method that a text names, with the last blocks trained in full if asked.

    Args:
        name: a name of `METHODS`, or parts, or both, with '+' between: 'tinytl-b+last-blocks(2)',
            'bias(0-3.7)+lite(1:k5g2.2:k3g4w50)'. `METHODS` come first: 'tinytl-l+b' is one name.
        last_blocks: how many.

    Raises:
        UnknownNameError: no such method or part.
        InputError: a part that cannot be read, parts that exclude each other, a negative number of blocks.
    """
    found = METHODS.get(name)
    if found is None:
        found = Method()
        words = name.split("+")
        kind = "method" if len(words) == 1 else "method part"
        while words:
            # names of METHODS have a '+' themselves: the longest one that stands here
            ends = (end for end in range(len(words), 0, -1) if "+".join(words[:end]) in METHODS)
            end = next(ends, 1)
            text = "+".join(words[:end])
            found += METHODS[text] if text in METHODS else read_part(text, METHODS, kind)
            words = words[end:]
    return found + LastBlocks(last_blocks) if last_blocks else found
