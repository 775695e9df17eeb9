"""What a module's forward does, as data: a list of steps over numbered values.

A program holds no tensors and no modules. Tensors of the module are named by their path in it (`Attr`), children too
(`Call`), functions by their public name (`Function`): so a program can be compared, copied and pickled, and what it
runs on is whatever module it is given. Sizes that were read off a tensor stay expressions (`Size`), so that a program
traced for one batch or one resolution runs at another.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tinytl.ops._op import Op


@dataclass(frozen=True)
class Ref:
    """Value number `index` of the program."""

    index: int


@dataclass(frozen=True)
class Attr:
    """The tensor at `path` in the module."""

    path: str


@dataclass(frozen=True)
class Size:
    """A number computed from sizes: `op` names an entry of `ARITHMETIC`, or is 'size' of (a value, an axis)."""

    op: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Device:
    """Where the program's input lies."""


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "neg": operator.neg,
    "ceil": math.ceil,
    "floor": math.floor,
    "round": round,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}


@dataclass(frozen=True)
class Step:
    """One thing that is done; its results become the values `outs`.

    Attributes:
        args, kwargs: nested tuples, lists and dicts of constants, `Ref`, `Attr`, `Size` and `Device`.
        keeps: autograd, as it is, would save whole images here.
        flows: a gradient flows through its result.
        random: it draws random numbers.
        constant: its result depends on nothing but the module's own tensors.
    """

    args: Any
    kwargs: Any
    outs: tuple[int, ...]
    keeps: bool = False
    flows: bool = False
    random: bool = False
    constant: bool = False

    def refs(self) -> Iterator[Ref]:
        """The values it takes."""
        return (leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Ref))


@dataclass(frozen=True)
class Call(Step):
    """Call the child at `path`."""

    path: str = ""


@dataclass(frozen=True)
class Function(Step):
    """Call the function of that public name, e.g. 'torch.Tensor.add'."""

    name: str = ""


@dataclass(frozen=True)
class Lean(Step):
    """Run one lean operation on the value `args[0]` with the tensors `args[1]` (`Ref`, `Attr` or None each)."""

    op: Op | None = None


@dataclass(frozen=True)
class Check(Step):
    """A comparison of sizes, `args`, by which the forward went its way: it must come out as it did."""

    op: str = ""
    outcome: bool = True


@dataclass(frozen=True)
class Segment(Step):
    """A stretch of steps that takes the values `args`, keeps only them, and runs again in backward."""

    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Program:
    """Inputs to output, in steps.

    Attributes:
        inputs: (args, kwargs) that the forward takes: each leaf a `Ref`, or a constant that it must equal.
        steps: in order.
        output: like a step's arguments.
        fixed: sizes of the input tensors (all axes but the first) that it is good for; None: any.
    """

    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    steps: tuple[Step, ...]
    output: Any
    fixed: tuple[tuple[int, ...], ...] | None = None

    @property
    def only_input(self) -> Ref | None:
        """The value that it takes, where that is all it takes, as one positional argument."""
        args, kwargs = self.inputs
        return args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Ref) else None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Any] | None:
        """The values that go in, by number; None if this is not how it is called."""
        values: dict[int, Any] = {}
        return values if _match(self.inputs, (args, kwargs), values) else None

    def calls(self) -> Iterator[Call]:
        """The calls of children."""
        return (step for step in self.steps if isinstance(step, Call))


def uses(steps: Iterable[Step], results: Any) -> dict[int, int]:
    """How often each value is taken, by a step or among `results`."""
    found: dict[int, int] = {}
    refs = [ref for step in steps for ref in step.refs()]
    for ref in (*refs, *(leaf for leaf in leaves(results) if isinstance(leaf, Ref))):
        found[ref.index] = found.get(ref.index, 0) + 1
    return found


def leaves(structure: Any) -> Iterator[Any]:
    """All leaves of nested containers, and of the expressions in them."""
    if isinstance(structure, (tuple, list)):
        for entry in structure:
            yield from leaves(entry)
    elif isinstance(structure, dict):
        for entry in structure.values():
            yield from leaves(entry)
    elif isinstance(structure, slice):
        yield from leaves((structure.start, structure.stop, structure.step))
    elif isinstance(structure, Size):
        yield from leaves(structure.args)
    else:
        yield structure


def _match(expected: Any, given: Any, values: dict[int, Any]) -> bool:
    if isinstance(expected, Ref):
        values[expected.index] = given
        return True
    if isinstance(expected, (tuple, list)):
        if not isinstance(given, (tuple, list)) or len(given) != len(expected):
            return False
        return all(_match(one, other, values) for one, other in zip(expected, given, strict=True))
    if isinstance(expected, dict):
        if not isinstance(given, dict) or list(given) != list(expected):
            return False
        return all(_match(entry, given[key], values) for key, entry in expected.items())
    return given is expected or (type(given) is type(expected) and bool(given == expected))


def replace_leaves(structure: Any, change: Callable[[Any], Any]) -> Any:
    """The same containers with other leaves (a `Size` is a leaf)."""
    if isinstance(structure, (tuple, list)):
        changed = [replace_leaves(entry, change) for entry in structure]
        if isinstance(structure, list):
            return changed
        kind = type(structure)
        if isinstance(structure, torch.Size) or kind is tuple:
            return tuple(changed)
        return kind(*changed) if hasattr(kind, "_fields") else kind(changed)
    if isinstance(structure, dict):
        items = {key: replace_leaves(entry, change) for key, entry in structure.items()}
        return items if type(structure) is dict else type(structure)(items)
    if isinstance(structure, slice):
        return slice(*(replace_leaves(part, change) for part in (structure.start, structure.stop, structure.step)))
    return change(structure)


@functools.cache
def function(name: str) -> Callable[..., Any]:
    """The function of that public name."""
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


def value_of(size: Any, values: Mapping[int, Any]) -> Any:
    """The number that an expression of sizes stands for."""
    if not isinstance(size, Size):
        return size
    if size.op == "size":
        return values[size.args[0].index].shape[size.args[1]]
    if size.op == "number":  # that the module was given
        return values[size.args[0].index]
    return ARITHMETIC[size.op](*(value_of(arg, values) for arg in size.args))


ADDITIONS = ("torch.Tensor.add", "torch.add")
