"""A fine-tuning method is a sum of parts; each part says one thing about what trains.

    >>> TINYTL_LB == Bias() + LiteResidual()
    True
    >>> (Bias() + LastBlocks(2)).name
    'bias+last-blocks(2)'

The classifier trains in every method. Names and contents follow the paper (NeurIPS 2020, section 4 and table 2).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from tinytl.errors import InputError, UnknownNameError


@dataclass(frozen=True)
class Part:
    """One thing that trains. Add parts to get a `Method`."""

    def __add__(self, other: Part | Method) -> Method:
        return Method((self,)) + other


@dataclass(frozen=True)
class Bias(Part):
    """Every bias of the main network: the shift of each normalization, or of a layer that has its own."""


@dataclass(frozen=True)
class Norm(Part):
    """Scale and shift of every normalization (statistics stay frozen)."""


@dataclass(frozen=True)
class Full(Part):
    """Every parameter of the network (statistics stay frozen)."""


@dataclass(frozen=True)
class LiteResidual(Part):
    """A lite residual module beside every block but the first (PAPER.md, "Lite residual module").

    Attributes:
        kernel_size: of the group convolution, odd; smaller where the pooled image is smaller.
        groups: of the group convolution.

    Raises:
        InputError: an even or non-positive kernel, no groups.
    """

    kernel_size: int = 5
    groups: int = 2

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise InputError(f"lite residual kernel size {self.kernel_size}: expected an odd number, 1 or more")
        if self.groups < 1:
            raise InputError(f"lite residual groups {self.groups}: expected 1 or more")


@dataclass(frozen=True)
class LastBlocks(Part):
    """Every parameter of the last `count` blocks and of all that stands behind them (the paper's dagger: 2).

    Raises:
        InputError: a negative count.
    """

    count: int = 2

    def __post_init__(self) -> None:
        if self.count < 0:
            raise InputError(f"last blocks {self.count}: expected 0 or more")


_PARTS: dict[str, type[Part]] = {
    "bias": Bias,
    "norm": Norm,
    "full": Full,
    "lite-residual": LiteResidual,
    "last-blocks": LastBlocks,
}


@dataclass(frozen=True)
class Method:
    """What trains, beside the classifier: a set of parts, at most one of a kind.

    Raises:
        InputError: two parts of one kind that differ.
    """

    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        for part in self.parts:
            if type(part) not in _PARTS.values():
                raise InputError(
                    f"method part {part!r}: expected one of {', '.join(k.__name__ for k in _PARTS.values())}"
                )
        kinds = [type(part) for part in self.parts]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise InputError(f"method has two parts of kind {kind.__name__}: expected one of a kind")

    def __add__(self, other: Part | Method) -> Method:
        more = other.parts if isinstance(other, Method) else (other,)
        return Method(self.parts + tuple(part for part in more if part not in self.parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Method) and set(self.parts) == set(other.parts)

    def __hash__(self) -> int:
        return hash(frozenset(self.parts))

    @property
    def name(self) -> str:
        """The name in `METHODS` if it has one (last blocks aside), else the names of its parts."""
        last = self.part(LastBlocks)
        rest = Method(tuple(part for part in self.parts if part is not last))
        known = next((name for name, method in METHODS.items() if method == rest), None)
        named = [known] if known else [_spell(part) for part in rest.parts]
        if last is not None and last.count and known == "ft-last":
            return _spell(last)
        return "+".join(named + ([_spell(last)] if last is not None and last.count else []))

    def part(self, kind: type[Part]) -> Any:
        """The part of that kind, or None."""
        return next((part for part in self.parts if type(part) is kind), None)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data from which `from_json` makes an equal method."""
        names = {kind: name for name, kind in _PARTS.items()}
        return [{"part": names[type(part)], **asdict(part)} for part in self.parts]

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
            knobs = {key: value for key, value in entry.items() if key != "part"}
            known = {field.name for field in fields(kind)}
            if not set(knobs) <= known or not all(type(value) is int for value in knobs.values()):
                raise InputError(f"method part {entry!r}: expected whole numbers for {sorted(known)}")
            parts.append(kind(**knobs))
        return Method(tuple(parts))


def _spell(part: Part) -> str:
    name = next(name for name, kind in _PARTS.items() if kind is type(part))
    return f"{name}({part.count})" if isinstance(part, LastBlocks) else name


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
    """The method of that name in `METHODS`, with the last blocks trained in full if asked.

    Raises:
        UnknownNameError: no such method.
        InputError: a negative number of blocks.
    """
    found = METHODS.get(name)
    if found is None:
        raise UnknownNameError("method", name, METHODS)
    return found + LastBlocks(last_blocks) if last_blocks else found
