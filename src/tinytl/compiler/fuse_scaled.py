"""A weight times a normalization's scale, for convolutions that take the scale themselves.

    scale_weight, then conv or conv_dx      the weight as it is, the scale as the `table` beside it

so that weight times scale is made while the weight is packed, a panel at a time, and lies nowhere. The scale is `rstd`
where gamma is frozen, and part of it; else gamma rstd, made for each use by `scale_weight` of a vector of ones, as in
`tinytl.compiler.lower_weights.scale_and_shift`. Gradients are not touched: what `conv_dw` sums belongs to the scaled
weight, and `scale_weight_grad` completes it once a step. Weights that are codes have a table already and are left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .program import Instruction, Tensor
from .step_builder import StepBuilder

_TAKE = ("conv", "conv_dx")


class Scales:
    """Fuses instructions of the streams of one program.

    Attributes:
        values: of the constants that it added: ones (1, 1, C), one for each number of channels.
    """

    def __init__(self, builder: StepBuilder) -> None:
        self.values: dict[int, torch.Tensor] = {}
        self._builder = builder
        self._ones: dict[int, int] = {}

    def fuse(self, stream: Sequence[Instruction]) -> list[Instruction]:
        """The stream with the scale beside the weight wherever no one but convolutions reads the product.

        Args:
            stream: in which a derived tensor is made before it is read, and once.
        """
        kept = {number for one in stream for number in one.reads() if not _takes(one, number)}
        weights: dict[int, tuple[int, int]] = {}  # scaled weight -> the weight, its scale
        found: list[Instruction] = []
        for one in stream:
            if one.op == "scale_weight" and one.operand("table") is None and _operand(one, "y") not in kept:
                scale = self._scale(one, found)
                weights[_operand(one, "y")] = _operand(one, "w"), scale
                continue
            if one.op in _TAKE and (weight := _operand(one, "w")) in weights:
                w, table = weights[weight]
                one = one.with_operands(w=w, table=table)
            found.append(one)
        return found

    def _scale(self, one: Instruction, into: list[Instruction]) -> int:
        """The tensor of the scale; what makes it is appended to `into`."""
        rstd = _operand(one, "rstd")
        if one.operand("gamma") is None:
            return rstd
        channels = self._builder.tensors[rstd].elements
        if channels not in self._ones:
            number = self._builder.add(Tensor(f"ones {channels}", "constant", "f32", (1, 1, channels)))
            self._ones[channels], self.values[number] = number, torch.ones(1, 1, channels)
        ones = self._ones[channels]
        name = f"{self._builder.tensors[_operand(one, 'y')].name}/scale"
        y = self._builder.add(Tensor(name, "derived", "f32", (1, 1, channels)))
        into.append(one.with_operands(w=ones, y=y).with_attributes(depthwise=1))
        return y


def _takes(one: Instruction, number: int) -> bool:
    """Whether that tensor is the weight of a convolution that has no table yet, and nothing else there."""
    takes = one.op in _TAKE and one.operand("w") == number and one.operand("table") is None
    return takes and one.operands.count(number) == 1


def _operand(one: Instruction, name: str) -> int:
    number = one.operand(name)
    assert number is not None
    return number
