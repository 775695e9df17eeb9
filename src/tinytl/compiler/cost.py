"""The work of an instruction, in multiply-adds."""

from __future__ import annotations

import math

from .program import Instruction, Program


def multiply_adds(program: Program, one: Instruction) -> int:
    """Of a convolution or linear layer, forward or backward, for one image; 0 for all else."""
    if one.op not in ("conv", "conv_dx", "conv_dw"):
        return 0
    weight, image = one.operand("w"), one.operand("y" if one.op == "conv" else "grad")
    assert weight is not None
    assert image is not None
    height, width, channels = program.tensors[image].shape
    return program.tensors[weight].elements // channels * math.prod((height, width, channels))
