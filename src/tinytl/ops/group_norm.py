"""Group norm with exact gradients.

    xhat = (x - mean) rstd over each image's group of channels        y = gamma xhat + beta

    dL/dx = rstd (gamma dL/dy - mean(gamma dL/dy) - xhat mean(gamma dL/dy xhat)), means over the group

The statistics depend on x, so even with gamma frozen the input gradient needs xhat: group norm is never free. The
paper's count charges nothing for it; this operation keeps its input and two numbers a group, and therefore asks its
chain to run again in backward (`recompute`), so that between the passes only the chain's own input is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._layout import dense
from ._op import NOTHING, Gradients, Keeps, Needs, Op, Shape, Tensors


@dataclass(frozen=True)
class GroupNorm(Op):
    """(N, C, ...) -> the same shape. Tensors: gamma (C,) or None, beta (C,) or None."""

    groups: int
    eps: float
    tensor_count: ClassVar[int] = 2
    recompute: ClassVar[bool] = True

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keeps x, and mean and rstd (N, groups), where anything at or before it trains but beta."""
        gamma, beta = (None if t is None else t.to(x.dtype) for t in tensors)
        n, c = x.shape[:2]
        sides = math.prod(x.shape[2:])
        y, mean, rstd = torch.native_group_norm(_operand(x), gamma, beta, n, c, sides, self.groups, self.eps)
        return dense(y), (x, mean, rstd) if self._needs_input(needs) else ()

    def backward(
        self,
        grad: Tensor,
        x_shape: Shape,
        tensors: Tensors,
        kept: tuple[Tensor, ...],
        needs: Needs,
        owned: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """See the module's docstring for the maths."""
        if not self._needs_input(needs):
            beta = tensors[1]
            assert beta is not None
            return None, (None, grad.sum((0, *range(2, grad.dim()))).to(beta.dtype))
        x, mean, rstd = kept
        gamma = tensors[0]
        n, c = x_shape[:2]
        grad_x, *rest = torch.ops.aten.native_group_norm_backward(
            *(_operand(grad), _operand(x), mean, rstd, None if gamma is None else gamma.to(x.dtype)),
            *(n, c, math.prod(x_shape[2:]), self.groups, [True, *needs.tensors]),
        )  # channels-last, the operator crashes unless the input's gradient is asked for (torch 2.13, CPU)
        grads = [
            g.to(t.dtype) if need and t is not None else None
            for g, t, need in zip(rest, tensors, needs.tensors, strict=True)
        ]
        return dense(grad_x) if needs.x else None, tuple(grads)

    @staticmethod
    def _needs_input(needs: Needs) -> bool:
        return needs.x or needs.tensors[0]

    def out_shape(self, x_shape: Shape) -> Shape:
        """Elementwise."""
        return x_shape

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """The input, and mean and rstd of every group of every image."""
        if not self._needs_input(needs):
            return NOTHING
        return Keeps(input=True, extra_bytes=2 * x_shape[0] * self.groups * dtype.itemsize, extra="statistics")


def _operand(t: Tensor) -> Tensor:
    """As PyTorch's operator takes it: channels-last on the CPU only, elsewhere (CUDA) with channels outermost."""
    return t if t.device.type == "cpu" else t.contiguous()
