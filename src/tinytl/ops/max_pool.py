"""Max pooling. Kept: one byte an output element, which of its window's pixels won; never the input.

    y = max of x over each window        dL/dx = dL/dy at the pixel that won, summed over the windows that it won

PyTorch keeps the input and the winner's place in the image as 64 bits, 36 bytes an output element at a 3 x 3 window
with stride 2 in float32. Here the winner's number inside the window (row by row) fits in 8 bits.

Of equal pixels the first one wins, row by row; a NaN wins over everything, the last one over the others; pixels
beyond the border are never there. All as PyTorch.

The compiled passes serve float32 and float64 on the CPU. Plain PyTorch serves everything else: it walks over the
window's taps, each a strided slice of the image, without a 64-bit index or a padded copy. Both give the same bits in
the winners, and the tests hold them together.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._native import KERNELS, run, serves
from ._op import NOTHING, Gradients, Keeps, Needs, Op, Shape, Tensors

Pair = tuple[int, int]

LARGEST_WINDOW = 256
"""Pixels of a window that a byte can number."""


@dataclass(frozen=True)
class MaxPool2d(Op):
    """(N, C, H, W) -> (N, C, H', W'); the options of torch.nn.MaxPool2d. A window has at most 256 pixels."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keeps the winners (uint8, in the shape of the output) where anything before it trains."""
        shape = self.out_shape(tuple(x.shape))
        if serves(KERNELS, x):
            y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
            won = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last) if needs.x else None
            run(KERNELS, "max_pool", x, x, y, won, self._geometry(tuple(x.shape)))
        else:
            y, won = self._walk(x, shape, needs.x)
        return y, () if won is None else (won,)

    def _geometry(self, x_shape: Shape) -> ctypes.Array[ctypes.c_int64]:
        n, c, *sides = x_shape
        numbers = (n, c, *sides, *self.out_shape(x_shape)[2:])
        numbers += (*self.kernel, *self.stride, *self.padding, *self.dilation)
        return (ctypes.c_int64 * len(numbers))(*numbers)

    def _walk(self, x: Tensor, shape: Shape, keep: bool) -> tuple[Tensor, Tensor | None]:
        y = x.new_full((), -math.inf).expand(shape).contiguous(memory_format=torch.channels_last)
        won = self._first(x, shape) if keep else None
        for tap, out, at in self._taps(tuple(x.shape), shape):
            pixels, best = x[at], y[out]
            if won is not None:
                better = (pixels > best).logical_or_(pixels.isnan())
                won[out].masked_fill_(better, tap)
            torch.maximum(best, pixels, out=best)  # a NaN wins
        return y, won

    def _first(self, x: Tensor, shape: Shape) -> Tensor:
        """Every window's first pixel inside the image, which wins where all are -inf."""
        rows, columns = (
            torch.tensor([-(-max(self.padding[a] - i * self.stride[a], 0) // self.dilation[a]) for i in range(side)])
            for a, side in enumerate(shape[2:])
        )
        first = (rows[:, None] * self.kernel[1] + columns).to(torch.uint8).to(x.device)
        return first.expand(shape).contiguous(memory_format=torch.channels_last)

    def backward(
        self,
        grad: Tensor,
        x_shape: Shape,
        tensors: Tensors,
        kept: tuple[Tensor, ...],
        needs: Needs,
        owned: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """To the winners."""
        won = kept[0]
        if serves(KERNELS, grad):
            full = torch.empty(x_shape, dtype=grad.dtype, memory_format=torch.channels_last)
            run(KERNELS, "max_pool_grad", grad, grad, won, full, self._geometry(x_shape))
            return full, ()
        full = torch.zeros(x_shape, dtype=grad.dtype, device=grad.device).contiguous(memory_format=torch.channels_last)
        for tap, out, at in self._taps(x_shape, tuple(grad.shape)):
            full[at] += torch.where(won[out] == tap, grad[out], grad.new_zeros(()))
        return full, ()

    def _taps(self, x_shape: Shape, shape: Shape) -> Iterator[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
        """Each of the window's pixels: its number, the windows that have it inside the image, and where it is there."""
        everything = slice(None)
        for row in range(self.kernel[0]):
            for column in range(self.kernel[1]):
                outs, ats = [everything, everything], [everything, everything]
                for a, tap in enumerate((row, column)):
                    shift, step = tap * self.dilation[a] - self.padding[a], self.stride[a]
                    first = max(-(shift // step), 0)  # the first window whose pixel is not before the image
                    last = min((x_shape[2 + a] - 1 - shift) // step, shape[2 + a] - 1)
                    outs.append(slice(first, last + 1))
                    ats.append(slice(first * step + shift, max(last * step + shift + 1, 0), step))
                    if last < first:
                        break
                else:
                    yield row * self.kernel[1] + column, tuple(outs), tuple(ats)

    def out_shape(self, x_shape: Shape) -> Shape:
        """As torch.nn.MaxPool2d."""
        sides = []
        for a in (0, 1):
            span = x_shape[2 + a] + 2 * self.padding[a] - self.dilation[a] * (self.kernel[a] - 1) - 1
            side = (span + (self.stride[a] - 1 if self.ceil_mode else 0)) // self.stride[a] + 1
            # a window must begin inside the image or its padding on the left
            if self.ceil_mode and (side - 1) * self.stride[a] >= x_shape[2 + a] + self.padding[a]:
                side -= 1
            sides.append(side)
        return (*x_shape[:2], *sides)

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """One byte an output element."""
        return Keeps(extra_bytes=math.prod(self.out_shape(x_shape)), extra="winners") if needs.x else NOTHING
