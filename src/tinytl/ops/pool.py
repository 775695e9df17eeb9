"""Average pooling and the global mean. Kept: nothing, the gradient needs only shapes.

    y = mean of x over each window        dL/dx = dL/dy spread evenly over its window

PyTorch's AvgPool2d saves its whole input, of which its backward reads nothing but the shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import dense
from ._op import NOTHING, Gradients, Keeps, Needs, Op, Shape, Tensors

Pair = tuple[int, int]


@dataclass(frozen=True)
class AvgPool2d(Op):
    """(N, C, H, W) -> (N, C, H', W'); the options of torch.nn.AvgPool2d."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None

    def _options(self) -> tuple[Pair, Pair, Pair, bool, bool, int | None]:
        return self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keeps nothing."""
        return dense(F.avg_pool2d(x, *self._options())), ()

    def backward(
        self,
        grad: Tensor,
        x_shape: Shape,
        tensors: Tensors,
        kept: tuple[Tensor, ...],
        needs: Needs,
        owned: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """Spread over the windows; the stand-in for x has its shape and one element of memory."""
        stand_in = grad.new_empty(1).expand(x_shape)
        return dense(torch.ops.aten.avg_pool2d_backward(grad, stand_in, *self._options())), ()

    def out_shape(self, x_shape: Shape) -> Shape:
        """As torch.nn.AvgPool2d."""
        return tuple(F.avg_pool2d(torch.empty(x_shape, device="meta"), *self._options()).shape)

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """Nothing."""
        return NOTHING


@dataclass(frozen=True)
class GlobalMean(Op):
    """(N, C, H, W) -> (N, C), or (N, C, 1, 1) if `keep_dims`."""

    keep_dims: bool = False

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keeps nothing."""
        return x.mean((2, 3), keepdim=self.keep_dims), ()

    def backward(
        self,
        grad: Tensor,
        x_shape: Shape,
        tensors: Tensors,
        kept: tuple[Tensor, ...],
        needs: Needs,
        owned: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """Every pixel gets the same share."""
        share = grad / (x_shape[2] * x_shape[3])
        return dense(share.view(*x_shape[:2], 1, 1).expand(x_shape)), ()

    def out_shape(self, x_shape: Shape) -> Shape:
        """Drops the sides, or leaves them at 1."""
        return (*x_shape[:2], 1, 1) if self.keep_dims else x_shape[:2]

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """Nothing."""
        return NOTHING
