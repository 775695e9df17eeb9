"""One memory layout for all lean operations: channels innermost.

Images (N, C, H, W) are kept channels-last (N, H, W, C in memory), everything else contiguous. A 1x1 convolution is
then one matrix product in both directions, a channel's bias gradient is a column sum, and a mask's bits lie in the
order in which memory is walked.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """`x` in the layout of this package: itself if it has it already, else a copy."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def rows(x: Tensor) -> Tensor:
    """A dense `x` as a matrix (everything else, channels), without a copy."""
    if x.dim() == 4:
        n, c, h, w = x.shape
        return x.permute(0, 2, 3, 1).view(n * h * w, c)
    return x.view(-1, x.shape[-1] if x.dim() else 1)


def from_rows(matrix: Tensor, n: int, h: int, w: int) -> Tensor:
    """A matrix (N*H*W, C) as channels-last images (N, C, H, W), without a copy."""
    return matrix.view(n, h, w, matrix.shape[1]).permute(0, 3, 1, 2)
