"""Linear layer with a frozen or trainable weight.

    y = x w^T + b        dL/dx = dL/dy w        dL/db = sum of dL/dy        dL/dw = dL/dy^T x

Kept: the input where the weight trains, else nothing (NeurIPS 2020 paper, equations 1 and 2). A frozen weight that is
stored packed is expanded for the product that needs it, in each direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import dense
from ._op import Gradients, Keeps, Needs, Op, Shape, Tensors
from .packing import Packing, expanded


@dataclass(frozen=True)
class Linear(Op):
    """(..., in) -> (..., out). Tensors: weight (out, in), bias (out,) or None; if packed, the weight's table."""

    out_features: int
    packing: Packing | None = None

    @property
    def tensor_count(self) -> int:  # type: ignore[override]
        """One more where the weight is packed."""
        return 2 + (self.packing is not None)

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keeps x only where the weight trains."""
        bias = tensors[1]
        y = F.linear(x, self._weight(tensors).to(x.dtype), None if bias is None else bias.to(x.dtype))
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
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = torch.mm(flat.t(), kept[0].reshape(-1, x_shape[-1])) if needs.tensors[0] else None
        grad_bias = flat.sum(0) if needs.tensors[1] else None
        grad_x = dense(torch.matmul(grad, self._weight(tensors).to(grad.dtype))) if needs.x else None
        grads = (grad_weight, grad_bias, *(None for _ in tensors[2:]))
        pairs = zip(grads, tensors, strict=True)
        return grad_x, tuple(None if g is None or t is None else g.to(t.dtype) for g, t in pairs)

    def _weight(self, tensors: Tensors) -> Tensor:
        return expanded(tensors[0], None if self.packing is None else tensors[2], self.packing)

    def out_shape(self, x_shape: Shape) -> Shape:
        """Replaces the last dimension."""
        return (*x_shape[:-1], self.out_features)

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """The input where the weight trains."""
        return Keeps(input=needs.tensors[0])
