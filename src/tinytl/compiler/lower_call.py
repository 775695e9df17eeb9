"""One call of a PyTorch operator, and what its tensors stand for: what the rules of `lower_aten` ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tinytl.ops._ghost import Ghost
from tinytl.ops._op import Op, Tensors

from .lower_builder import Builder
from .lowering import Value, affine, lower_stage

Arguments = dict[str, Any]


class Standing(Protocol):
    """What stands for what: `tinytl.compiler.capture_trace.Tracer`."""

    def value(self, ghost: Ghost) -> Value:
        """Return what the tensor without memory stands for."""
        ...

    def stands_for(self, ghost: Ghost, value: Value, overwritten: bool = False) -> None:
        """Note it."""
        ...


class AtenLowering:
    """Lowers one operator call after the other.

    Args:
        builder: what the instructions are added to.
        standing: what the operators' tensors stand for.
        rules: operator -> from its arguments by name and its first output to what that output stands for; None where
            no instruction has these options.
    """

    def __init__(self, builder: Builder, standing: Standing, rules: Mapping[Any, Rule]) -> None:
        self.b, self._standing, self._rules = builder, standing, rules

    def lower(self, func: Any, args: Sequence[Any], kwargs: Arguments, out: Any) -> None:
        """Lower the call `func(*args, **kwargs)`, which made `out`.

        Raises:
            UnsupportedLayerError: see above.
        """
        rule = self._rules.get(func)
        if rule is None:
            raise self.b.refusal(str(func))
        schema = func._schema.arguments
        bound = {a.name: a.default_value for a in schema if a.has_default_value()}
        bound |= dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        first = out[0] if isinstance(out, (tuple, list)) else out
        value = rule(self, bound, first)
        if value is None:
            raise self.b.refusal(f"{func} with these options or shapes")
        given = bound.get("self", bound.get("input"))
        self._standing.stands_for(first, value, overwritten=first is given and not _is_view(func))

    # ------------------------------------------------------------ what rules ask

    def value(self, x: Any) -> Value | None:
        """What an argument stands for; None if it is made of numbers."""
        return self._standing.value(x) if isinstance(x, Ghost) else None

    def plain(self, x: Any) -> Value | None:
        """The same, of an image or a vector as it is."""
        value = self.value(x)
        return value if value is not None and value.plain else None

    def is_vector(self, value: Value) -> bool:
        """Whether it is one number a channel."""
        return self.b.shape(value.number)[:2] == (1, 1)

    def stage(self, op: Op, tensors: Tensors, x: Ghost) -> Value:
        """A lean operation in the place of the operator."""
        return lower_stage(self.b, op, tensors, self._standing.value(x), tuple(x.shape))

    def by_channel(self, number: Any, x: Ghost) -> Tensor | None:
        """(C,) float64 of a number or a frozen tensor that is broadcast over `x` by channel; None: it is not."""
        value = self.plain(x)
        if value is None or isinstance(number, Ghost) or x.dim() not in (2, 4):
            return None
        channels = self.b.shape(value.number)[2]
        if not isinstance(number, Tensor):
            return torch.full((channels,), float(number), dtype=torch.float64)
        if self.b.trains(number):
            raise self.b.refusal(f"{self.b.trained_name(number)}, which trains and is multiplied or added by itself,")
        sides = (*(1,) * (x.dim() - number.dim()), *number.shape)
        if len(sides) != x.dim() or any(side != 1 for at, side in enumerate(sides) if at != 1):
            return None
        return number.detach().cpu().double().flatten().expand(channels).clone()

    def affine(self, x: Ghost, scale: Tensor | float, shift: Tensor | float) -> Value:
        """`x scale + shift` with numbers, or vectors (C,) float64."""
        value = self._standing.value(x)
        channels = self.b.shape(value.number)[2]
        made = []
        for name, number in (("scale", scale), ("shift", shift)):
            vector = number if isinstance(number, Tensor) else torch.full((channels,), number, dtype=torch.float64)
            # under its own name: each is made for this call alone
            made.append(self.b.constant(name, [vector], lambda vector=vector: vector.to(x.dtype)))
        return affine(self.b, value, made[0], made[1] if bool(torch.as_tensor(shift).any()) else None)


Rule = Callable[[AtenLowering, Arguments, Any], "Value | None"]


def _is_view(func: Any) -> bool:
    """Whether the operator overwrites nothing."""
    return not any(argument.is_write for argument in func._schema.arguments)
