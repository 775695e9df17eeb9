"""ReLU, ReLU6 and LeakyReLU, exact, with one bit an element kept.

    y = x                  where lo < x < hi
    y = lo + slope (x-lo)  where x <= lo          (slope 0 but for LeakyReLU)
    y = hi                 where x >= hi

    dL/dx = dL/dy          where lo < x < hi, slope * dL/dy elsewhere

At the kinks the derivative is that of PyTorch: 0 (or `slope`) at x = lo and at x = hi.

Kept: one bit an element where anything before it trains, else nothing (NeurIPS 2020 paper, section 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._masks import activate_, mask_bytes, masked_grad
from ._op import NOTHING, Gradients, Keeps, Needs, Op, Shape, Tensors


@dataclass(frozen=True)
class Activation(Op):
    """A piecewise linear activation; ReLU by default, ReLU6 with `hi=6`, LeakyReLU with a `slope`."""

    lo: float = 0.0
    hi: float = math.inf
    slope: float = 0.0

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """In place if `owned`; keeps the mask."""
        y = x if owned else x.clone()
        mask = activate_(y, self.lo, self.hi, self.slope, keep_mask=needs.x)
        return y, () if mask is None else (mask,)

    def backward(
        self,
        grad: Tensor,
        x_shape: Shape,
        tensors: Tensors,
        kept: tuple[Tensor, ...],
        needs: Needs,
        owned: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """Select by the mask, in place if `owned`."""
        return masked_grad(grad, kept[0], self.slope, want_sum=False, in_place=owned)[0], ()

    def out_shape(self, x_shape: Shape) -> Shape:
        """Elementwise."""
        return x_shape

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """One bit an element."""
        return Keeps(extra_bytes=mask_bytes(math.prod(x_shape))) if needs.x else NOTHING
