"""A program in the making: tensors are appended under unique names, instructions collected in lists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from .program import Instruction, Tensor


class StepBuilder:
    """Tensors, to which more are added; their numbers stay what they are."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors: list[Tensor] = []
        self._names: set[str] = set()
        self._used: dict[str, int] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> int:
        """Append a tensor, its name with a number behind it where there is one of that name; return its number."""
        name = tensor.name
        while name in self._names:
            count = self._used[tensor.name] = self._used.get(tensor.name, 1) + 1
            name = f"{tensor.name}#{count}"
        self._names.add(name)
        self.tensors.append(replace(tensor, name=name))
        return len(self.tensors) - 1

    def like(self, number: int, suffix: str, role: str | None = None) -> int:
        """A new tensor in the image of another, named after it."""
        model = self.tensors[number]
        return self.add(replace(model, name=f"{model.name}/{suffix}", role=role or model.role))

    def role(self, number: int) -> str:
        """Of a tensor."""
        return self.tensors[number].role


def acts(one: Instruction) -> bool:
    """Whether an instruction ends in an activation."""
    return one.attributes.get("lo", -math.inf) > -math.inf or one.attributes.get("hi", math.inf) < math.inf


def renamed(one: Instruction, new: Mapping[int, int]) -> Instruction:
    """The instruction with tensors exchanged for others."""
    return replace(one, operands=tuple(n if n is None else new.get(n, n) for n in one.operands))
