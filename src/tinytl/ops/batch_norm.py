"""Batch norm with frozen statistics, where it cannot be folded because its scale trains behind a frozen weight.

    y = gamma (x - mean) / sqrt(var + eps) + beta

    dL/dx     = dL/dy gamma / sqrt(var + eps)
    dL/dbeta  = sum over N, H, W of dL/dy
    dL/dgamma = sum over N, H, W of dL/dy (x - mean) / sqrt(var + eps)        the only one that needs x

Kept: the input where gamma trains (FT-Norm+Last), else nothing. In every other case the normalization is part of the
convolution in front of it (see `tinytl.ops._weights`) and this operation is not there at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._layout import dense
from ._op import Gradients, Keeps, Needs, Op, Shape, Tensors


@dataclass(frozen=True)
class FrozenBatchNorm(Op):
    """(N, C, ...) -> the same shape. Tensors: gamma or None, beta or None, mean, var, each (C,)."""

    eps: float
    tensor_count: ClassVar[int] = 4

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keeps x only where gamma trains."""
        _, scale = self._scale(tensors, x.dtype)
        beta, mean = tensors[1], tensors[2]
        assert mean is not None
        shift = -mean * scale if beta is None else beta - mean * scale
        y = torch.addcmul(_along(shift.to(x.dtype), x), x, _along(scale, x))
        return dense(y), (x,) if needs.tensors[0] else ()

    def recall(self, x: Tensor, tensors: Tensors, needs: Needs) -> tuple[Tensor, ...]:
        """As forward, which computes nothing that it keeps."""
        return (x,) if needs.tensors[0] else ()

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
        rstd, scale = self._scale(tensors, grad.dtype)
        mean = tensors[2]
        assert mean is not None
        grad_gamma = grad_beta = None
        total = _columns(grad).sum(0) if needs.tensors[0] or needs.tensors[1] else None
        if needs.tensors[0]:
            assert total is not None
            # sum g (x - mean) = sum g x - mean sum g: one fused pass, no centred copy of x
            moment = torch.linalg.vecdot(_columns(grad), _columns(kept[0]), dim=0)
            grad_gamma = ((moment - mean * total) * rstd).to(mean.dtype)
        if needs.tensors[1]:
            assert total is not None
            grad_beta = total.to(mean.dtype)
        grad_x = None
        if needs.x:
            grad_x = grad.mul_(_along(scale, grad)) if owned else grad * _along(scale, grad)
        return grad_x, (grad_gamma, grad_beta, None, None)

    def _scale(self, tensors: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        gamma, var = tensors[0], tensors[3]
        assert var is not None
        rstd = torch.rsqrt(var + self.eps)
        return rstd, (rstd if gamma is None else rstd * gamma).to(dtype)

    def out_shape(self, x_shape: Shape) -> Shape:
        """Elementwise."""
        return x_shape

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """The input where gamma trains."""
        return Keeps(input=needs.tensors[0])


def _along(channel: Tensor, like: Tensor) -> Tensor:
    """A per-channel vector shaped to broadcast over `like` (N, C, ...)."""
    return channel.view(1, -1, *(1,) * (like.dim() - 2))


def _columns(t: Tensor) -> Tensor:
    """`t` (N, C, ...) as a matrix (everything else, C); no copy of channels-last images."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])
