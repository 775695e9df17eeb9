"""What the interpreter hands to the function of an op, and what several of them share: masks, codes, axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .program import Instruction, Program


@dataclass(frozen=True)
class StepScalars:
    """What changes from step to step.

    Attributes:
        lr: learning rate of this step.
        step: its number, from 1.
        seed: of dropout's draws.
        count: images of the whole batch, by which the loss is divided.
        train: False while evaluating: dropout then changes nothing.
    """

    lr: float = 0.0
    step: int = 1
    seed: int = 0
    count: int = 1
    train: bool = True


@dataclass(frozen=True)
class Call:
    """One instruction with the values that it reads.

    Attributes:
        program: that it belongs to.
        instruction: what is to be done.
        values: operand -> value, of those that are present and read; per-image ones as (images, ...).
        images: for how many images.
        first: number, in the batch, of the first of them.
        step: what changes from step to step.
        dtype: of floating-point results.
    """

    program: Program
    instruction: Instruction
    values: Mapping[str, Tensor]
    images: int
    first: int
    step: StepScalars
    dtype: torch.dtype

    def __getitem__(self, operand: str) -> Tensor:
        """The value of an operand that must be there."""
        return self.values[operand]

    def get(self, operand: str) -> Tensor | None:
        """The value of an operand, None where it is absent."""
        return self.values.get(operand)

    def wants(self, operand: str) -> bool:
        """Whether an operand is present."""
        return self.instruction.operand(operand) is not None

    def number(self, attribute: str) -> int:
        """A whole attribute."""
        return int(self.instruction.attributes[attribute])

    def real(self, attribute: str) -> float:
        """A real attribute."""
        return float(self.instruction.attributes[attribute])

    def shape(self, operand: str) -> tuple[int, ...]:
        """An operand's shape, without the axis of images."""
        number = self.instruction.operand(operand)
        assert number is not None, f"{self.instruction.op}: {operand} is absent"
        return self.program.tensors[number].shape

    def weight(self, operand: str = "w") -> Tensor:
        """A weight as numbers: its codes expanded by the `table` beside it."""
        return expand(self[operand], self.get("table"), self.dtype)

    def act(self, z: Tensor, results: dict[str, Tensor], y: str = "y") -> dict[str, Tensor]:
        """Put the activation of ``z`` and, where it is wanted, its mask among the results."""
        lo, hi, slope = self.real("lo"), self.real("hi"), self.real("slope")
        below, above = z <= lo, z >= hi
        out = z
        if lo > -math.inf:
            out = torch.where(below, lo + slope * (z - lo) if slope else lo, out)  # 0 of minus infinity is 0
        if hi < math.inf:
            out = torch.where(above, hi, out)
        results[y] = out
        if self.wants("mask"):
            results["mask"] = pack(~(below | above))
        return results

    def unmasked(self, grad: Tensor) -> Tensor:
        """``grad`` where the mask's bit is 1 (or there is no mask), else slope times that."""
        mask = self.get("mask")
        if mask is None:
            return grad
        slope = self.real("slope")  # 0 of an infinite gradient is 0
        return torch.where(unpack(mask, grad.shape[-1]), grad, slope * grad if slope else torch.zeros_like(grad))


OpFunction = Callable[[Call], dict[str, Tensor]]
"""What an op does: the new value of each operand 'out' and 'inout', and what is added to each 'add'."""


def pack(bits: Tensor) -> Tensor:
    """(..., C) bool -> (..., ceil(C / 8)) uint8: channel c in bit c & 7 of byte c >> 3; unused bits are 0."""
    channels = bits.shape[-1]
    bytes_ = -(-channels // 8)
    wide = torch.nn.functional.pad(bits.to(torch.uint8), (0, bytes_ * 8 - channels))
    places = 2 ** torch.arange(8, dtype=torch.uint8)
    return (wide.reshape(*bits.shape[:-1], bytes_, 8) * places).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, channels: int) -> Tensor:
    """The inverse of `pack`."""
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(-2)[..., :channels].bool()


def expand(weight: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A weight as numbers: i8 and f32 by a scale for each output channel, u8 by 256 values, f16 by one scale.

    The output channel is the first axis of (O, kh, kw, I / groups), the last one of (kh, kw, C).
    """
    if table is None:
        return weight.to(dtype)
    table = table.to(dtype)
    if weight.dtype == torch.uint8:
        return table.flatten()[weight.long()]
    if weight.dtype == torch.float16:
        return weight.to(dtype) * table.flatten()
    return weight.to(dtype) * by_output(table.flatten(), weight.dim() == 3)


def by_output(vector: Tensor, depthwise: bool) -> Tensor:
    """(O,) so that it multiplies a weight by output channel."""
    return vector if depthwise else vector[:, None, None, None]


def channels_first(x: Tensor) -> Tensor:
    """(n, H, W, C) -> (n, C, H, W), a view."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """(n, C, H, W) -> (n, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


def over_channels(x: Tensor) -> Tensor:
    """(..., C) -> (C,): summed over everything else."""
    return x.flatten(0, -2).sum(0)
