"""Float32 values held as 8 bits each: the dynamic code of Dettmers et al., in blocks of 256 values with one scale each.

A block's largest magnitude a is kept in float32, and each of its values x as the number of the entry nearest to x / a
in a fixed table of 256 (arXiv 2110.02861, section 2; arXiv 1511.04561 for the code):

    signed:    0, 1 and +-10^(i-6) m,  m the middle of one of 2^i     equal parts of [0.1, 1],  i = 0..6
    unsigned:  0, 1 and   10^(i-6) m,  m the middle of one of 2^(i+1) equal parts of [0.1, 1],  i = 0..6

So the steps are fine near a and coarse far below it, over seven decades. It is an approximation: a value is off by at
most 0.71 % of a (unsigned: 0.36 %), and where it is above a tenth of a by at most 7.1 % of itself (3.6 %).

One departure from the paper: in the unsigned code a value above 0 is never rounded to 0. Adam divides by the root of
what is held there, and one value rounded to 0 beside a larger one would be a step thousands of times too long.

The nearest entry is looked up and not searched for: the upper 16 bits of a float32 (sign, exponent, 7 bits of the
mantissa) are a narrower range than any step of the code, so a table says the entry for that range's low end, and one
comparison whether it is the next. It is 10 times as fast as a binary search, and gives the same (a test says so).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
"""Values that share a scale."""
CODE_BYTES = 2 * 4 * 256 + 2**16
"""Of the tables of one code. They are made at the first step on a device and stay; Adam takes both codes, SGD one."""


@dataclass(frozen=True, eq=False)
class Code:
    """A table of 256 values, and how to find the nearest; `CODE_BYTES` together.

    Attributes:
        values: (256,) float32, ascending.
        upper: (256,) float32: the largest number that is rounded to each of them; inf for the last.
        first: (65536,) uint8: the entry for the smallest number with these upper 16 bits.
    """

    values: Tensor
    upper: Tensor
    first: Tensor


@functools.cache
def code(signed: bool, device: torch.device) -> Code:
    """Return the signed code, on [-1, 1], or the unsigned one, on [0, 1]."""
    positive = [
        10.0 ** (i - 6) * (0.1 + 0.9 * (part + 0.5) / parts)
        for i in range(7)
        for parts in (2 ** (i if signed else i + 1),)
        for part in range(parts)
    ]
    negative = [-value for value in positive] if signed else []
    values = torch.tensor(sorted([*negative, 0.0, *positive, 1.0]), dtype=torch.float64)
    upper = torch.cat([(values[:-1] + values[1:]) / 2, torch.full((1,), torch.inf, dtype=torch.float64)]).float()
    if not signed:
        upper[0] = 0.0  # nothing above 0 is rounded to 0
    # the smallest float with given upper bits: of negative ones that with all lower bits set
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    lowest = torch.where(high < 0, high * 2**16 + 0xFFFF, high * 2**16).view(torch.float32)
    first = torch.bucketize(lowest, upper[:-1]).to(torch.uint8)  # NaN: the last
    first = first.roll(2**15)  # by the bits as an unsigned number: positive floats first
    return Code(values.float().to(device), upper.to(device), first.to(device))


def blocks(values: int) -> int:
    """Return how many scales so many values have."""
    return -(-values // BLOCK)


def decode(codes: Tensor, absmax: Tensor, table: Code, out: Tensor, index: Tensor) -> None:
    """Write the values that are held into ``out``.

    Args:
        codes, absmax: (n,) uint8 and (blocks(n),) float32.
        table: the code that they were made with.
        out: float32, of blocks(n) * BLOCK values; those behind n become 0.
        index: scratch memory of that shape, int32.
    """
    count = len(codes)
    index[:count].copy_(codes)
    torch.index_select(table.values, 0, index[:count], out=out[:count])
    out[count:].zero_()
    out.view(-1, BLOCK).mul_(absmax[:, None])


def encode(values: Tensor, codes: Tensor, absmax: Tensor, table: Code, spare: Tensor, index: Tensor) -> None:
    """Hold the first n of ``values`` as ``codes`` (n,) and ``absmax`` (blocks(n),), which are written to.

    ``values`` as the ``out`` of `decode` and 0 behind n; it is used up, and so are ``spare`` (float32) and ``index``
    (int32), of the same shape. A block that holds NaN or infinity is decoded to such: nothing is hidden.
    """
    count = len(codes)
    rows = values.view(-1, BLOCK)
    torch.amax(torch.abs(values, out=spare).view(-1, BLOCK), 1, out=absmax)
    rows.div_(torch.where(absmax > 0, absmax, 1.0)[:, None])
    values, spare, index = values[:count], spare[:count], index[:count]
    torch.bitwise_right_shift(values.view(torch.int32), 16, out=index).bitwise_and_(0xFFFF)
    torch.index_select(table.first, 0, index, out=codes)
    index.copy_(codes)
    torch.index_select(table.upper, 0, index, out=spare)
    above = index.view(torch.uint8)[:count]  # its memory again: a sum of two types would copy both
    torch.gt(values, spare, out=above.view(torch.bool))
    codes.add_(above)
