"""Squeeze and excite: each channel times a gate that the whole image decides.

    m = mean of x over H, W                             (N, C)
    u = m w1^T + b1        a = act(u)                   (N, S), S the squeezed width
    v = a w2^T + b2        s = gate(v)                  (N, C)
    y = x s

    ds = sum over H, W of dL/dy x       dv = gate'(v) ds      da = dv w2      du = act'(u) da      dm = du w1
    dL/dx = dL/dy s + dm / (H W)        dL/dw2 = dv^T a       dL/db2 = sum of dv        dL/dw1, dL/db1 alike by du

ds needs x, whatever trains: the operation keeps it, and m (N, C), and asks its chain to run again in backward
(`recompute`). The vectors in between are made again from m. Frozen weights that are stored packed are expanded one at a
time, each for the product that needs it.

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
from .packing import Packing, expanded
from .smooth_activation import Kind, SmoothActivation


@dataclass(frozen=True)
class SqueezeExcite(Op):
    """(N, C, H, W) -> the same.

    Tensors: w1 (S, C) or (S, C, 1, 1), b1 (S,) or None, w2 (C, S) likewise, b2 (C,); then, of each weight that is
    packed (`packings`: of w1 and w2), its table.
    """

    act: Kind | Literal["relu"] = "relu"
    gate: Kind = "sigmoid"
    packings: tuple[Packing | None, Packing | None] = (None, None)
    recompute: ClassVar[bool] = True

    @property
    def tensor_count(self) -> int:  # type: ignore[override]
        """One more for each weight that is packed."""
        return 4 + sum(packing is not None for packing in self.packings)

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
        b1, b2 = (None if t is None else t.to(mean.dtype) for t in (tensors[1], tensors[3]))
        u = F.linear(mean, self._matrix(0, tensors, mean.dtype), b1)
        a = F.relu(u) if self.act == "relu" else SmoothActivation(self.act).apply(u)
        v = F.linear(a, self._matrix(1, tensors, mean.dtype), b2)
        return u, a, v, SmoothActivation(self.gate).apply(v)

    def _matrix(self, which: int, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """w1 (S, C) or w2 (C, S) in the type of the activations."""
        packing = self.packings[which]
        before = 4 + (which == 1 and self.packings[0] is not None)
        table = None if packing is None else tensors[before]
        return expanded(tensors[2 * which], table, packing).to(dtype).flatten(1)

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
        dv = SmoothActivation(self.gate).pull_back((grad * x).sum((2, 3)), v, in_place=True)
        du = dm = None
        if needs.x or needs.tensors[0] or needs.tensors[1]:
            da = dv @ self._matrix(1, tensors, grad.dtype)
            du = da * (u > 0) if self.act == "relu" else SmoothActivation(self.act).pull_back(da, u)
        grads = (*_affine(du, mean, needs.tensors[:2]), *_affine(dv, a, needs.tensors[2:4]))
        if needs.x:
            assert du is not None
            dm = ((du @ self._matrix(0, tensors, grad.dtype)) / (x_shape[2] * x_shape[3]))[:, :, None, None]
            scale = scale[:, :, None, None]
            dm = torch.addcmul(dm, grad, scale, out=grad) if owned else dense(torch.addcmul(dm, grad, scale))
        pairs = zip(grads, tensors[:4], strict=True)
        found = (None if g is None or t is None else g.view_as(t).to(t.dtype) for g, t in pairs)
        return dm, (*found, *(None for _ in tensors[4:]))

    def out_shape(self, x_shape: Shape) -> Shape:
        """Elementwise."""
        return x_shape

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """The input, and its mean over H and W."""
        if not needs.any:
            return NOTHING
        return Keeps(input=True, extra_bytes=x_shape[0] * x_shape[1] * dtype.itemsize, extra="means")


def _affine(grad: Tensor | None, x: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias of a linear layer whose output's gradient is `grad`, where needed."""
    if grad is None:
        return None, None
    return grad.t() @ x if needs[0] else None, grad.sum(0) if needs[1] else None
