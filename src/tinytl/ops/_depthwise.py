"""The gradient of a depthwise weight without partial sums of it.

    dL/dw[c, a, b] = sum over n, i, j of dL/dy[n, c, i, j] x[n, c, i s + a d - p, j s + b d - p]

PyTorch's operator has a fast pass for kernels up to 3 x 3 and outputs from 3 x 3 on. For others it sums in 256 copies
of the weight, 58 MB for 1152 channels of 7 x 7, and takes ten times as long or more. The compiled pass walks over the
pixels once for each row of the kernel and 16 channels, with their sums in registers, and needs no memory. Plain
PyTorch, where that was not built, multiplies and sums a tap at a time, some rows after the others, so that its
temporaries stay small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._native import KERNELS, run, serves
from ._windows import Windows

WIDER_THAN = 3
"""Kernels up to this side are PyTorch's own fast pass's."""

SMALLER_THAN = 3
"""Outputs from this side on are."""

_SLICE = 1 << 16  # elements that the plain path multiplies at a time


def depthwise_weight_gradient(grad: Tensor, x: Tensor, windows: Windows) -> Tensor:
    """Gradient (C, 1, kh, kw) from those of the output (N, C, H', W') and the input (N, C, H, W), both dense."""
    result = grad.new_empty((grad.shape[1], 1, *windows.kernel))
    if serves(KERNELS, grad):
        run(KERNELS, "depthwise_weight_grad", grad, grad, x, result, windows.geometry)
        return result
    for row in range(windows.kernel[0]):
        for column in range(windows.kernel[1]):
            result[:, 0, row, column] = _tap(grad, x, windows, (row, column))
    return result


def _tap(grad: Tensor, x: Tensor, windows: Windows, tap: tuple[int, int]) -> Tensor:
    """(C,): the sum over the windows whose pixel number `tap` lies inside the image."""
    outs, ats = [], []
    for a in (0, 1):
        shift, step = windows.first(a, tap[a]), windows.stride[a]
        begin = max(-(shift // step), 0)  # the first window whose pixel is not before the image
        end = max(min((x.shape[2 + a] - 1 - shift) // step, windows.sides[a] - 1) + 1, begin)
        outs.append((begin, end))
        ats.append(range(begin * step + shift, end * step + shift, step))
    total = grad.new_zeros(grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
    (begin, end), columns = outs[0], slice(*outs[1])
    pixels = slice(ats[1].start, max(ats[1].stop - ats[1].step + 1, ats[1].start), ats[1].step)
    rows = max(_SLICE // (grad.shape[0] * grad.shape[1] * grad.shape[3]), 1)
    for first in range(begin, end, rows):
        last = min(first + rows, end)
        lines = slice(ats[0][first - begin], ats[0][last - 1 - begin] + 1, ats[0].step)
        product = grad[:, :, first:last, columns] * x[:, :, lines, pixels]
        total += product.sum((0, 2, 3), dtype=total.dtype)
    return total
