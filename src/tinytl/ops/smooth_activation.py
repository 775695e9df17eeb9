"""Activations whose derivative bends with the input: hard-swish, SiLU, GELU and their like. Exact, by recomputation.

    hard_sigmoid  min(max(x / 6 + 1/2, 0), 1)          sigmoid  1 / (1 + exp(-x))
    hard_swish    x hard_sigmoid(x)                    silu     x sigmoid(x)
    gelu          x Phi(x), by erf                     gelu_tanh  the same, by the usual tanh formula
    mish          x tanh(log(1 + exp(x)))              elu      x above 0, alpha (exp(x) - 1) below

    dL/dx = f'(x) dL/dy, with PyTorch's own derivative, at the kinks too

One bit an element does not tell f'(x), so the operation keeps its input, and therefore asks its chain to run again in
backward (`recompute`): between the passes only the chain's own input is kept. sigmoid and tanh could tell theirs from
the output; but that belongs to the next operation, which may overwrite it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ._layout import dense
from ._op import NOTHING, Gradients, Keeps, Needs, Op, Shape, Tensors

Kind = Literal["hard_swish", "hard_sigmoid", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "mish", "elu"]

_aten: Any = torch.ops.aten
# kind -> (f, f in place, f' times the gradient)
_FUNCTIONS: dict[str, tuple[Any, Any, Any]] = {
    "hard_swish": (_aten.hardswish.default, _aten.hardswish_.default, _aten.hardswish_backward),
    "hard_sigmoid": (_aten.hardsigmoid.default, _aten.hardsigmoid_.default, _aten.hardsigmoid_backward),
    "silu": (_aten.silu.default, _aten.silu_.default, _aten.silu_backward),
    "gelu": (_aten.gelu.default, _aten.gelu_.default, _aten.gelu_backward),
    "gelu_tanh": (_aten.gelu.default, _aten.gelu_.default, _aten.gelu_backward),
    "sigmoid": (_aten.sigmoid.default, _aten.sigmoid_.default, _aten.sigmoid_backward),
    "tanh": (_aten.tanh.default, _aten.tanh_.default, _aten.tanh_backward),
    "mish": (_aten.mish.default, _aten.mish_.default, _aten.mish_backward),
    "elu": (_aten.elu.default, _aten.elu_.default, _aten.elu_backward),
}


@dataclass(frozen=True)
class SmoothActivation(Op):
    """One of `Kind`, elementwise; `alpha` is ELU's."""

    kind: Kind
    alpha: float = 1.0
    recompute: ClassVar[bool] = True

    def apply(self, x: Tensor, in_place: bool = False) -> Tensor:
        """f(x), in x itself if `in_place`."""
        function = _FUNCTIONS[self.kind][1 if in_place else 0]
        if self.kind == "elu":
            return function(x, self.alpha)
        if self.kind == "gelu_tanh":
            return function(x, approximate="tanh")
        return function(x)

    def pull_back(self, grad: Tensor, x: Tensor, in_place: bool = False) -> Tensor:
        """f'(x) grad, in grad itself if `in_place`."""
        function = _FUNCTIONS[self.kind][2]
        if self.kind == "mish":  # has no form with a place for its result
            return function(grad, x)
        result: dict[str, Any] = {} if not in_place else {"out" if self.kind == "hard_swish" else "grad_input": grad}
        if self.kind in ("sigmoid", "tanh"):
            return function(grad, self.apply(x), **result)
        if self.kind == "elu":
            return function(grad, self.alpha, 1.0, 1.0, False, x, **result)
        if self.kind == "gelu_tanh":
            return function(grad, x, approximate="tanh", **result)
        return function(grad, x, **result)

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keeps x, where anything before it trains; else in place if `owned`."""
        if needs.x:
            return dense(self.apply(x)), (x,)
        return dense(self.apply(x, in_place=owned)), ()

    def recall(self, x: Tensor, tensors: Tensors, needs: Needs) -> tuple[Tensor, ...]:
        """The input."""
        return (x,) if needs.x else ()

    def backward(
        self,
        grad: Tensor,
        x_shape: Shape,
        tensors: Tensors,
        kept: tuple[Tensor, ...],
        needs: Needs,
        owned: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """By the kept input, in place if `owned`."""
        return dense(self.pull_back(grad, kept[0], in_place=owned)), ()

    def out_shape(self, x_shape: Shape) -> Shape:
        """Elementwise."""
        return x_shape

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """The input."""
        return Keeps(input=True) if needs.x else NOTHING
