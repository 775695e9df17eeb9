"""Group norm with exact gradients.

    xhat = (x - mean) rstd over each image's group of channels        y = gamma xhat + beta

    dL/dx = rstd (gamma dL/dy - mean(gamma dL/dy) - xhat mean(gamma dL/dy xhat)), means over the group

The statistics depend on x, so even with gamma frozen the input gradient needs xhat: group norm is never free. The
paper's count charges nothing for it; this operation keeps its input and two numbers a group, and therefore asks its
chain to run again in backward (`recompute`), so that between the passes only the chain's own input is kept.

Both directions are written over their argument where it is ours: at every pixel they are the same line through each
channel, a x + b and a dL/dy + b x + c, whose coefficients come out of one sum a channel. PyTorch's operators make a
tensor beside it, and serve what the passes here do not: other types than float32 and float64, other devices, and
forward without a C++ compiler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._layout import dense
from ._native import KERNELS, SUFFIX, run, serves
from ._op import NOTHING, Gradients, Keeps, Needs, Op, Shape, Tensors

_CHUNKS = 32  # partial sums of a column at the most
_CHUNK = 64  # rows of a chunk at the least
_SLICE = 1 << 16  # elements that the plain pass multiplies at a time


@dataclass(frozen=True)
class GroupNorm(Op):
    """(N, C, ...) -> the same shape. Tensors: gamma (C,) or None, beta (C,) or None."""

    groups: int
    eps: float
    tensor_count: ClassVar[int] = 2
    recompute: ClassVar[bool] = True

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keeps x, and mean and rstd (N, groups), where anything at or before it trains but beta."""
        keep = self._needs_input(needs)
        if not _is_ours(x) or KERNELS is None:
            y, mean, rstd = self._stock(x, tensors)
            return y, (x, mean, rstd) if keep else ()
        y = x if owned and not keep else torch.empty_like(x)
        mean, rstd = self._normalize(x, tensors, y)
        return y, (x, mean, rstd) if keep else ()

    def recall(self, x: Tensor, tensors: Tensors, needs: Needs) -> tuple[Tensor, ...]:
        """As forward; the statistics alone need no output."""
        if not self._needs_input(needs) or not _is_ours(x) or KERNELS is None:
            return self.forward(x, tensors, needs, False)[1]
        return (x, *self._normalize(x, tensors, None))

    def _stock(self, x: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        gamma, beta = (None if t is None else t.to(x.dtype) for t in tensors)
        n, c = x.shape[:2]
        sides = math.prod(x.shape[2:])
        y, mean, rstd = torch.native_group_norm(_operand(x), gamma, beta, n, c, sides, self.groups, self.eps)
        return dense(y), mean, rstd

    def _normalize(self, x: Tensor, tensors: Tensors, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The statistics of x, (N, groups) each; y, which may be x, is filled."""
        n, c, sides = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        mean, rstd = x.new_empty((n, self.groups)), x.new_empty((n, self.groups))
        chunks = _chunks(n, sides)
        scratch = x.new_empty(n * chunks * 2 * c, dtype=torch.float64)
        gamma, beta = _vectors(tensors, x.dtype)
        tail = (n, sides, c, self.groups, self.eps, scratch, chunks)
        run(KERNELS, "group_norm", x, x, y, gamma, beta, mean, rstd, *tail)
        return mean, rstd

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
        if _is_ours(x) and grad.dtype == x.dtype:
            out = None if not needs.x else grad if owned else torch.empty_like(grad)
            backward = self._compiled_backward if serves(KERNELS, x) else self._plain_backward
            found = backward(grad, x, mean, rstd, _vectors(tensors, x.dtype)[0], out, needs.tensors)
        else:
            out, *found = self._stock_backward(grad, x, mean, rstd, tensors[0], needs)
        grads = [
            g.to(t.dtype) if need and t is not None and g is not None else None
            for g, t, need in zip(found, tensors, needs.tensors, strict=True)
        ]
        return out if needs.x else None, tuple(grads)

    def _stock_backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor | None, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        n, c = x.shape[:2]
        grad_x, *rest = torch.ops.aten.native_group_norm_backward(
            *(_operand(grad), _operand(x), mean, rstd, None if gamma is None else gamma.to(x.dtype)),
            *(n, c, math.prod(x.shape[2:]), self.groups, [True, *needs.tensors]),
        )  # channels-last, the operator crashes unless the input's gradient is asked for (torch 2.13, CPU)
        return dense(grad_x), *rest

    def _compiled_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        gamma: Tensor | None,
        out: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Fills `out`, which may be `grad`; gradients of gamma and beta where wanted."""
        n, c, sides = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        chunks = _chunks(n, sides)
        grad_gamma, grad_beta = (grad.new_empty(c) if want else None for want in wanted)
        tail = (grad_gamma, grad_beta, n, sides, c, self.groups, grad.new_empty(n * (1 + 2 * chunks) * c), chunks)
        run(KERNELS, "group_norm_grad", grad, grad, x, out, gamma, mean, rstd, *tail)
        return grad_gamma, grad_beta

    def _plain_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        gamma: Tensor | None,
        out: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The same in plain PyTorch."""
        c, groups = x.shape[1], self.groups
        centres, scales = (t.repeat_interleave(c // groups, 1) for t in (mean, rstd))  # (N, C)
        grad_gamma, grad_beta = grad.new_zeros(c), grad.new_zeros(c)
        for i in range(len(x)):
            # of one image, as rows (H*W, C)
            g, pixels = grad[i].permute(1, 2, 0).flatten(0, 1), x[i].permute(1, 2, 0).flatten(0, 1)
            total, dot = grad.new_zeros(c), grad.new_zeros(c)
            step = max(_SLICE // c, 1)
            for begin in range(0, len(g), step):
                part = pixels[begin : begin + step] - centres[i]
                dot += part.mul_(g[begin : begin + step]).sum(0)
                total += g[begin : begin + step].sum(0)
            grad_gamma += dot * scales[i]
            grad_beta += total
            if out is None:
                continue
            by_grad = scales[i] if gamma is None else scales[i] * gamma
            weighted = (total, dot) if gamma is None else (total * gamma, dot * gamma)
            total, dot = (
                t.view(groups, -1).sum(1).repeat_interleave(c // groups) / (len(g) * (c // groups)) for t in weighted
            )
            by_x = -dot * scales[i] ** 3
            target = out[i].permute(1, 2, 0).flatten(0, 1)
            torch.mul(g, by_grad, out=target)
            target.addcmul_(pixels, by_x).add_(-by_x * centres[i] - total * scales[i])
        return grad_gamma if wanted[0] else None, grad_beta if wanted[1] else None

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


def _is_ours(x: Tensor) -> bool:
    """Whether the passes of this file know `x`: images on the CPU, channels-last."""
    return x.dim() == 4 and x.device.type == "cpu" and x.dtype in SUFFIX


def _chunks(images: int, sides: int) -> int:
    """Partial sums of a column for each image; by shape alone, so that sums do not depend on the threads."""
    return max(min(math.ceil(_CHUNKS / max(images, 1)), sides // _CHUNK), 2)


def _vectors(tensors: Tensors, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype).contiguous() for t in tensors]


def _operand(t: Tensor) -> Tensor:
    """As PyTorch's operator takes it: channels-last on the CPU only, elsewhere (CUDA) with channels outermost."""
    return t if t.device.type == "cpu" else t.contiguous()
