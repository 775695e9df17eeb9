"""Squeeze and excite: each channel times a gate that the whole image decides.

    m = mean of x over H, W                             (N, C)
    u = m w1^T + b1        a = act(u)                   (N, S), S the squeezed width
    v = a w2^T + b2        s = gate(v)                  (N, C)
    y = x s

    ds = sum over H, W of dL/dy x       dv = gate'(v) ds      da = dv w2      du = act'(u) da      dm = du w1
    dL/dx = dL/dy s + dm / (H W)        dL/dw2 = dv^T a       dL/db2 = sum of dv        dL/dw1, dL/db1 alike by du

ds needs x, whatever trains: the operation keeps it, and m (N, C), and asks its chain to run again in backward
(`recompute`). The vectors in between are made again from m.

Source: Hu et al., "Squeeze-and-Excitation Networks" (arXiv 1709.01507); gates as MobileNetV3 (1905.02244) and
EfficientNet (1905.11946) have them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import dense
from ._op import NOTHING, Gradients, Keeps, Needs, Op, Shape, Tensors
from .smooth_activation import Kind, SmoothActivation


@dataclass(frozen=True)
class SqueezeExcite(Op):
    """(N, C, H, W) -> the same. Tensors: w1 (S, C) or (S, C, 1, 1), b1 (S,) or None, w2 (C, S) likewise, b2 (C,)."""

    act: Kind | Literal["relu"] = "relu"
    gate: Kind = "sigmoid"
    tensor_count: ClassVar[int] = 4
    recompute: ClassVar[bool] = True

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keeps x and its mean where anything at or before it trains; else in place if `owned`."""
        mean = x.mean((2, 3))
        scale = self._gates(mean, tensors)[3][:, :, None, None]
        if needs.any:
            return dense(x * scale), (x, mean)
        return dense(x.mul_(scale) if owned else x * scale), ()

    def recall(self, x: Tensor, tensors: Tensors, needs: Needs) -> tuple[Tensor, ...]:
        """The input and its mean."""
        return (x, x.mean((2, 3))) if needs.any else ()

    def _gates(self, mean: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, a, v and s of the module's docstring."""
        w1, b1, w2, b2 = _matrices(tensors, mean.dtype)
        u = F.linear(mean, w1, b1)
        a = F.relu(u) if self.act == "relu" else SmoothActivation(self.act).apply(u)
        v = F.linear(a, w2, b2)
        return u, a, v, SmoothActivation(self.gate).apply(v)

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
        x, mean = kept
        u, a, v, scale = self._gates(mean, tensors)
        w1, _, w2, _ = _matrices(tensors, grad.dtype)
        dv = SmoothActivation(self.gate).pull_back((grad * x).sum((2, 3)), v, in_place=True)
        du = dm = None
        if needs.x or needs.tensors[0] or needs.tensors[1]:
            da = dv @ w2
            du = da * (u > 0) if self.act == "relu" else SmoothActivation(self.act).pull_back(da, u)
        grads = (*_affine(du, mean, needs.tensors[:2]), *_affine(dv, a, needs.tensors[2:]))
        if needs.x:
            assert du is not None
            dm = ((du @ w1) / (x_shape[2] * x_shape[3]))[:, :, None, None]
            scale = scale[:, :, None, None]
            dm = torch.addcmul(dm, grad, scale, out=grad) if owned else dense(torch.addcmul(dm, grad, scale))
        return dm, tuple(
            None if g is None or t is None else g.view_as(t).to(t.dtype) for g, t in zip(grads, tensors, strict=True)
        )

    def out_shape(self, x_shape: Shape) -> Shape:
        """Elementwise."""
        return x_shape

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """The input, and its mean over H and W."""
        if not needs.any:
            return NOTHING
        return Keeps(input=True, extra_bytes=x_shape[0] * x_shape[1] * dtype.itemsize, extra="means")


def _matrices(tensors: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """w1 (S, C), b1, w2 (C, S), b2 in the type of the activations."""
    w1, b1, w2, b2 = (None if t is None else t.to(dtype) for t in tensors)
    assert w1 is not None
    assert w2 is not None
    return w1.flatten(1), b1, w2.flatten(1), b2


def _affine(grad: Tensor | None, x: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias of a linear layer whose output's gradient is `grad`, where needed."""
    if grad is None:
        return None, None
    return grad.t() @ x if needs[0] else None, grad.sum(0) if needs[1] else None
