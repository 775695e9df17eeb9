"""Convolutions of few pixels with many filters, as matrix products with gathered windows.

A window is the kh x kw pixels that one pixel of the output reads. In channels-last order those of one group are rows of

    X (N*H'*W', kh*kw*in)           and its filters, as they are stored, rows of W (out, kh*kw*in)

    y = X W^T        dL/dW = dL/dy^T X        dL/dX = dL/dy W, and each pixel of x adds up what its windows get

PyTorch's operator lays the whole weight out anew for each of the three, and holds it twice for its gradient. X has a
row for each pixel of the output: it is smaller than the weight where there are fewer pixels than filters, which is
where weights are large. One group is gathered at a time.

The compiled passes gather and add up float32 and float64 on the CPU; plain PyTorch does the rest.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._filters import filters
from ._layout import from_rows, rows
from ._native import KERNELS, run, serves
from ._op import Shape

Pair = tuple[int, int]

_NARROWEST = 32  # channels of a group whose products are worth a call each


@dataclass(frozen=True)
class Windows:
    """Where the windows of a convolution lie, height before width.

    Attributes:
        image: shape (N, C, H, W) of what they read.
        sides: how many windows there are.
        kernel, stride, dilation: the convolution's.
        before: pixels of zeros above and left of the image.
    """

    image: Shape
    sides: Pair
    kernel: Pair
    stride: Pair
    dilation: Pair
    before: Pair

    @property
    def count(self) -> int:
        """Windows of all images."""
        return self.image[0] * math.prod(self.sides)

    def first(self, axis: int, tap: int) -> int:
        """Where the first window's pixel number `tap` along that axis lies; below 0: before the image."""
        return tap * self.dilation[axis] - self.before[axis]

    @functools.cached_property
    def geometry(self) -> ctypes.Array[ctypes.c_int64]:
        """As the compiled passes take it."""
        numbers = (*self.image, *self.sides, *self.kernel, *self.stride, *self.before, *self.dilation)
        return (ctypes.c_int64 * len(numbers))(*numbers)


def gathering_pays(windows: Windows, out_channels: int, groups: int) -> bool:
    """Whether the gathered windows of one group take no more memory than the weight does."""
    return windows.image[1] >= groups * _NARROWEST and windows.count <= out_channels


def convolve(x: Tensor, weight: Tensor, windows: Windows, groups: int) -> Tensor:
    """The output (N, out, H', W') of the dense `x`, without a bias."""
    shape = (windows.image[0], weight.shape[0], *windows.sides)
    # no view of a matrix: a chain's output may be added to in place, which autograd forbids for views
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    matrix, product = filters(weight), rows(y)
    for inside, outside in _groups(windows, weight.shape[0], groups):
        # (N*H'*W', kh*kw*in) @ (kh*kw*in, out)
        torch.mm(_gathered(x, windows, inside), matrix[outside].t(), out=product[:, outside])
    return y


def weight_gradient(grad: Tensor, x: Tensor, windows: Windows, groups: int) -> Tensor:
    """Gradient (out, in/groups, kh, kw), channels-last, from those of the output and the input, both dense."""
    out, width = grad.shape[1], x.shape[1] // groups
    result = grad.new_empty((groups, out // groups, math.prod(windows.kernel) * width))
    for group, (inside, outside) in enumerate(_groups(windows, out, groups)):
        # (out, N*H'*W') @ (N*H'*W', kh*kw*in)
        torch.mm(rows(grad)[:, outside].t(), _gathered(x, windows, inside), out=result[group])
    return result.view(out, *windows.kernel, width).permute(0, 3, 1, 2)


def input_gradient(grad: Tensor, weight: Tensor, windows: Windows, groups: int) -> Tensor:
    """Gradient (N, in, H, W) from that of the output, dense."""
    matrix = filters(weight)
    n, c, height, width = windows.image
    result = grad.new_empty((n * height * width, c))
    for inside, outside in _groups(windows, grad.shape[1], groups):
        # (N*H'*W', out) @ (out, kh*kw*in)
        _scatter(torch.mm(rows(grad)[:, outside], matrix[outside]), result, windows, inside)
    return from_rows(result, n, height, width)


def _groups(windows: Windows, out: int, groups: int) -> Iterator[tuple[slice, slice]]:
    """Channels of the input and of the output."""
    into, out = windows.image[1] // groups, out // groups
    for group in range(groups):
        yield slice(group * into, (group + 1) * into), slice(group * out, (group + 1) * out)


def _gathered(x: Tensor, windows: Windows, channels: slice) -> Tensor:
    """Those channels of the windows, (N*H'*W', kh*kw*channels)."""
    width = channels.stop - channels.start
    matrix = x.new_empty((windows.count, math.prod(windows.kernel) * width))
    if serves(KERNELS, x):
        run(KERNELS, "gather_windows", x, x, matrix, windows.geometry, channels.start, width)
        return matrix
    taps = matrix.view(windows.image[0], *windows.sides, *windows.kernel, width)
    image = _bordered(x.permute(0, 2, 3, 1)[..., channels], windows)
    for row, column, at in _taps(windows):
        taps[:, :, :, row, column] = image[at]
    return matrix


def _scatter(matrix: Tensor, result: Tensor, windows: Windows, channels: slice) -> None:
    """Those channels of an image (N*H*W, C): at each pixel the sum of the rows of the windows that read it."""
    width = channels.stop - channels.start
    if serves(KERNELS, matrix):
        run(KERNELS, "scatter_windows", matrix, matrix, result, windows.geometry, channels.start, width)
        return
    n, _, height, breadth = windows.image
    taps = matrix.view(n, *windows.sides, *windows.kernel, width)
    image = _bordered(matrix.new_zeros((n, height, breadth, width)), windows)
    for row, column, at in _taps(windows):
        image[at] += taps[:, :, :, row, column]
    top, left = windows.before
    inner = image[:, top : top + height, left : left + breadth]
    result.view(n, height, breadth, -1)[..., channels] = inner


def _bordered(image: Tensor, windows: Windows) -> Tensor:
    """The image (N, H, W, C) with the zeros around it that windows reach."""
    after = [
        windows.first(a, windows.kernel[a] - 1) + (windows.sides[a] - 1) * windows.stride[a] + 1 - windows.image[2 + a]
        for a in (0, 1)
    ]
    (top, left), (bottom, right) = windows.before, (max(side, 0) for side in after)
    return F.pad(image, (0, 0, left, right, top, bottom))


def _taps(windows: Windows) -> Iterator[tuple[int, int, tuple[slice, slice, slice]]]:
    """Each pixel of the kernel, and where it lies in a bordered image, window by window."""
    for row in range(windows.kernel[0]):
        for column in range(windows.kernel[1]):
            at = [slice(None)]
            for a, tap in enumerate((row, column)):
                begin = tap * windows.dilation[a]
                at.append(slice(begin, begin + (windows.sides[a] - 1) * windows.stride[a] + 1, windows.stride[a]))
            yield row, column, (at[0], at[1], at[2])
