"""Average pooling, to a factor or to a size, and the global mean. Kept: nothing, the gradient needs only shapes.

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
        """Spread over the windows."""
        if self._tiles(x_shape):
            return self._spread_over_tiles(grad, x_shape), ()
        # the stand-in for x has its shape and one element of memory
        stand_in = grad.new_empty(1).expand(x_shape)
        return dense(torch.ops.aten.avg_pool2d_backward(grad, stand_in, *self._options())), ()

    def _tiles(self, x_shape: Shape) -> bool:
        """Whether the windows lie side by side and each is whole: then every pixel is in at most one."""
        whole = not self.ceil_mode or all(x_shape[2 + a] % self.kernel[a] == 0 for a in (0, 1))
        return whole and self.kernel == self.stride and self.padding == (0, 0) and self.divisor is None

    def _spread_over_tiles(self, grad: Tensor, x_shape: Shape) -> Tensor:
        """One pass over memory, channels innermost; PyTorch's own backward would go through another layout."""
        (kh, kw), (n, c, oh, ow) = self.kernel, grad.shape
        covered = (oh * kh, ow * kw) == tuple(x_shape[2:])
        make = torch.empty if covered else torch.zeros
        out = make((n, *x_shape[2:], c), dtype=grad.dtype, device=grad.device)
        tiles = out[:, : oh * kh, : ow * kw].unflatten(2, (ow, kw)).unflatten(1, (oh, kh))  # (N, oh, kh, ow, kw, C)
        tiles.copy_((grad / (kh * kw)).permute(0, 2, 3, 1)[:, :, None, :, None])
        return out.permute(0, 3, 1, 2)

    def out_shape(self, x_shape: Shape) -> Shape:
        """As torch.nn.AvgPool2d."""
        sides = []
        for a in (0, 1):
            span = x_shape[2 + a] + 2 * self.padding[a] - self.kernel[a]
            side = (span + (self.stride[a] - 1 if self.ceil_mode else 0)) // self.stride[a] + 1
            # a window must begin inside the image or its padding on the left
            if self.ceil_mode and (side - 1) * self.stride[a] >= x_shape[2 + a] + self.padding[a]:
                side -= 1
            sides.append(side)
        return (*x_shape[:2], *sides)

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """Nothing."""
        return NOTHING


@dataclass(frozen=True)
class AdaptiveAvgPool2d(Op):
    """(N, C, H, W) -> (N, C, *size); None keeps a side. A window is [floor(i H / size), ceil((i + 1) H / size))."""

    size: tuple[int | None, int | None]

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keeps nothing."""
        even = self._even(tuple(x.shape))
        if even is not None:
            return even.forward(x, tensors, needs, owned)
        return dense(torch.ops.aten._adaptive_avg_pool2d(x, self.out_shape(tuple(x.shape))[2:])), ()

    def backward(
        self,
        grad: Tensor,
        x_shape: Shape,
        tensors: Tensors,
        kept: tuple[Tensor, ...],
        needs: Needs,
        owned: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """Spread over the windows."""
        even = self._even(x_shape)
        if even is not None:
            return even.backward(grad, x_shape, tensors, kept, needs, owned)
        stand_in = grad.new_empty(1).expand(x_shape)  # of which only the shape counts
        return dense(torch.ops.aten._adaptive_avg_pool2d_backward(grad, stand_in)), ()

    def _even(self, x_shape: Shape) -> AvgPool2d | None:
        """The ordinary pooling that it is where the sides divide."""
        sides, size = x_shape[2:], self.out_shape(x_shape)[2:]
        if any(side % part for side, part in zip(sides, size, strict=True)):
            return None
        kernel = (sides[0] // size[0], sides[1] // size[1])
        return AvgPool2d(kernel, kernel)

    def out_shape(self, x_shape: Shape) -> Shape:
        """Replaces the sides."""
        return (*x_shape[:2], *(s if n is None else n for s, n in zip(x_shape[2:], self.size, strict=True)))

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
