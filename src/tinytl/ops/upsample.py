"""Bilinear upsampling (corners not aligned). Kept: nothing, it is linear with fixed coefficients.

y = U x        dL/dx = U^T dL/dy
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import dense
from ._op import NOTHING, Gradients, Keeps, Needs, Op, Shape, Tensors


@dataclass(frozen=True)
class UpsampleBilinear(Op):
    """(N, C, H, W) -> (N, C, *size)."""

    size: tuple[int, int]

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keeps nothing; an image that has the size already passes as it is."""
        if tuple(x.shape[2:]) == self.size:
            return x, ()
        return dense(F.interpolate(x, self.size, mode="bilinear", align_corners=False)), ()

    def backward(
        self,
        grad: Tensor,
        x_shape: Shape,
        tensors: Tensors,
        kept: tuple[Tensor, ...],
        needs: Needs,
        owned: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """The transposed interpolation."""
        if x_shape[2:] == self.size:
            return grad, ()
        back = torch.ops.aten.upsample_bilinear2d_backward(
            grad, self.size, x_shape, False, scales_h=None, scales_w=None
        )
        return dense(back), ()

    def out_shape(self, x_shape: Shape) -> Shape:
        """Replaces the sides."""
        return (*x_shape[:2], *self.size)

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """Nothing."""
        return NOTHING
