"""Convolution with a frozen or trainable weight, an activation fused behind it.

    y = act(w * x + b)

    dL/dz = act'(z) dL/dy        from the activation's bits, in place where the gradient is ours
    dL/db = sum over N, H, W of dL/dz, in the same pass over memory
    dL/dx = the transposed convolution of dL/dz with w: needs w, never x
    dL/dw = the correlation of x with dL/dz: the only one that needs x

Kept: the input where the weight (or a scale folded into it) trains, else nothing; one bit an element of the output for
the activation (NeurIPS 2020 paper, equations 1 and 2).

Speed, on the CPU and channels-last: the input gradient of a 1x1 convolution is a matrix product, that of any other
a transposed convolution. PyTorch's own convolution_backward would first fill a whole tensor in the shape of the
input, of which it needs only the shape. Where a weight is larger than what it is applied to, all three go through
`_windows`, and the gradient of a wide depthwise weight through `_depthwise`: neither lays the weight out again.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ._depthwise import SMALLER_THAN, WIDER_THAN, depthwise_weight_gradient
from ._layout import dense, from_rows, rows
from ._masks import mask_bytes, masked_grad
from ._op import Gradients, Keeps, Needs, Op, Shape, Tensors
from ._pointwise import LAID_OUT_AGAIN, in_pieces, pointwise
from ._pointwise import input_gradient as packed_input_gradient
from ._pointwise import product as packed_product
from ._weights import WeightRecipe
from ._windows import Windows, convolve, gathering_pays, input_gradient, weight_gradient
from .activation import Activation
from .packing import Packing

Pair = tuple[int, int]


@dataclass(frozen=True)
class Padding:
    """Zeros around an image. `same` overrides the numbers: TensorFlow's SAME, the odd one at the bottom and right."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    same: bool = False

    @staticmethod
    def symmetric(height: int, width: int) -> Padding:
        """The usual `padding=(height, width)`."""
        return Padding(height, height, width, width)

    def along(self, axis: int, size: int, kernel: int, stride: int, dilation: int) -> Pair:
        """(before, after) along `axis` (0: height, 1: width) of a side of `size` pixels."""
        if not self.same:
            return (self.top, self.bottom) if axis == 0 else (self.left, self.right)
        total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
        return total // 2, total - total // 2


@dataclass(frozen=True)
class _Plan:
    """How one call runs on operators that only know symmetric padding.

    Where before and after differ, the kernel grows by rows and columns of zeros instead of the image: padding the
    larger amount on both sides and shifting the taps is the same sum, without a copy of the image. A dilated kernel
    cannot be shifted by less than its dilation; there the image is padded.
    """

    symmetric: Pair
    grow: tuple[int, int, int, int]  # F.pad order (left, right, top, bottom), of the kernel
    pad: tuple[int, int, int, int]  # F.pad order, of the image


@functools.lru_cache(maxsize=1024)
def _plan(x_shape: Shape, op: Conv2d) -> _Plan:
    kernel = op.kernel
    symmetric, grow, pad = [0, 0], [(0, 0), (0, 0)], [(0, 0), (0, 0)]
    for axis in (0, 1):
        before, after = op.padding.along(axis, x_shape[2 + axis], kernel[axis], op.stride[axis], op.dilation[axis])
        if before == after or op.dilation[axis] == 1:
            symmetric[axis] = max(before, after)
            grow[axis] = (max(after - before, 0), max(before - after, 0))
        else:
            pad[axis] = (before, after)
    return _Plan((symmetric[0], symmetric[1]), (*grow[1], *grow[0]), (*pad[1], *pad[0]))


@functools.lru_cache(maxsize=1024)
def _windows(x_shape: Shape, op: Conv2d) -> Windows:
    top, left = (op.padding.along(a, x_shape[2 + a], op.kernel[a], op.stride[a], op.dilation[a])[0] for a in (0, 1))
    height, width = op.out_shape(x_shape)[2:]
    return Windows(x_shape, (height, width), op.kernel, op.stride, op.dilation, (top, left))


@dataclass(frozen=True)
class Conv2d(Op):
    """Convolution, then `activation` if there is one. Tensors: those of `recipe` (weight, bias, ...)."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Padding = field(default_factory=Padding)
    dilation: Pair = (1, 1)
    groups: int = 1
    out_channels: int = 0
    recipe: WeightRecipe = field(default_factory=WeightRecipe)
    activation: Activation | None = None

    @property
    def tensor_count(self) -> int:  # type: ignore[override]
        """As many as the recipe takes."""
        return self.recipe.tensor_count

    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (N, C_in, H, W) -> y (N, C_out, H', W'); keeps x where the weight moves, and the activation's mask."""
        y = self._convolve(x, tensors)
        kept = (x,) if self.recipe.moves_weight(needs.tensors) else ()
        if self.activation is not None:
            _, mask = self.activation.forward(y, (), Needs(needs.any), owned=True)
            kept += mask
        return y, kept

    def _convolve(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Convolution and bias; a new tensor."""
        plan = _plan(tuple(x.shape), self)
        packed = self._in_pieces(x.dtype, tensors, plan)
        if packed is not None:
            y = packed_product(x, *packed)
            return y if tensors[1] is None else y.add_(tensors[1].view(-1, 1, 1))
        windows = self._gathered(tuple(x.shape), plan, x.device)
        scale = None
        if self.recipe.norm_eps is not None and self._scales_output(x):
            weight, bias, scale = self.recipe.make_unscaled(tensors)
        else:
            weight, bias = self.recipe.make(tensors)
        weight = weight.to(x.dtype)
        whole = windows is None and not self._as_product(x, weight, plan)
        if windows is not None:
            y = convolve(x, weight, windows, self.groups)
        elif not whole:
            y = pointwise(x, weight)
        else:
            weight = _grown(weight, plan)
            y = F.conv2d(
                F.pad(x, plan.pad) if any(plan.pad) else x,
                weight,
                None if bias is None or scale is not None else bias.to(x.dtype),
                self.stride,
                plan.symmetric,
                self.dilation,
                self.groups,
            )
        del weight  # one that was made takes memory for this operator alone
        y = dense(y)
        if scale is not None:
            y.mul_(scale.to(x.dtype).view(-1, 1, 1))
        if bias is not None and (scale is not None or not whole):
            y.add_(bias.to(x.dtype).view(-1, 1, 1))
        return y

    def _as_product(self, x: Tensor, weight: Tensor, plan: _Plan) -> bool:
        """Whether PyTorch's convolution would lay out a large weight again, and a matrix product does as well."""
        return x.device.type == "cpu" and self._is_pointwise(plan) and weight.nbytes > LAID_OUT_AGAIN

    def _in_pieces(self, dtype: torch.dtype, tensors: Tensors, plan: _Plan) -> tuple[Tensor, Tensor, Packing] | None:
        """Codes, table and packing of a weight that is expanded some filters at a time; None where it is not."""
        recipe = self.recipe
        if recipe.packing is None or recipe.norm_eps is not None or not self._is_pointwise(plan):
            return None
        codes, table = tensors[0], tensors[2]
        assert codes is not None
        assert table is not None
        return (codes, table, recipe.packing) if table.dtype == dtype and in_pieces(codes, table) else None

    def _scales_output(self, x: Tensor) -> bool:
        """(s w) x = s (w x): scale what is smaller; in half precision the weight, as w x alone may overflow."""
        weight = self.out_channels * (x.shape[1] // self.groups) * math.prod(self.kernel)
        return x.dtype.itemsize >= 4 and math.prod(self.out_shape(tuple(x.shape))) < weight

    def _gathered(self, x_shape: Shape, plan: _Plan, device: torch.device) -> Windows | None:
        """The windows, if this convolution of them is a matrix product (see `_windows`)."""
        if device.type != "cpu" or self._is_pointwise(plan):
            return None
        windows = _windows(x_shape, self)
        return windows if gathering_pays(windows, self.out_channels, self.groups) else None

    def recall(self, x: Tensor, tensors: Tensors, needs: Needs) -> tuple[Tensor, ...]:
        """As forward; without an activation there is nothing to compute."""
        if self.activation is not None:
            return self.forward(x, tensors, needs, False)[1]
        return (x,) if self.recipe.moves_weight(needs.tensors) else ()

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
        wants_weight = self.recipe.moves_weight(needs.tensors)
        wants_bias = self.recipe.moves_bias(needs.tensors)
        grad_bias = None
        if self.activation is not None:
            slope = self.activation.slope
            grad, grad_bias = masked_grad(grad, kept[-1], slope, want_sum=wants_bias, in_place=owned)
        elif wants_bias:
            grad_bias = rows(grad).sum(0)
        plan = _plan(x_shape, self)
        scales = None if self.recipe.norm_eps is None else self.recipe.scale(tensors)
        grad_x = None
        # A weight that is made takes memory while it is used: it is gone before its gradient is made.
        first = needs.x and self.recipe.standardize
        if first:
            grad_x = self._input_gradient(grad, x_shape, tensors, scales, plan, owned=False)
        grad_weight = self._weight_gradient(grad, kept[0], plan, tensors[0]) if wants_weight else None
        grads: Gradients = (None,) * self.tensor_count
        if wants_weight or wants_bias:
            # in the parameters' own type: activations may run in a lower precision (autocast)
            dtype = self.recipe.dtype(tensors)
            grad_weight = None if grad_weight is None else grad_weight.to(dtype)
            grad_bias = None if grad_bias is None else grad_bias.to(dtype)
            grads = self.recipe.gradients(tensors, needs.tensors, grad_weight, grad_bias, scales)
        if needs.x and not first:
            ours = owned or self.activation is not None
            grad_x = self._input_gradient(grad, x_shape, tensors, scales, plan, owned=ours)
        return grad_x, grads

    def _input_gradient(
        self,
        grad: Tensor,
        x_shape: Shape,
        tensors: Tensors,
        scales: tuple[Tensor, Tensor] | None,
        plan: _Plan,
        *,
        owned: bool,
    ) -> Tensor:
        packed = self._in_pieces(grad.dtype, tensors, plan)
        if packed is not None:
            product = packed_input_gradient(rows(grad), *packed)
            return from_rows(product, x_shape[0], x_shape[2], x_shape[3])
        weight = self.recipe.unscaled(tensors).to(grad.dtype)
        if scales is not None:  # (s w) g = w (s g): scale what is smaller
            scale = scales[1].to(grad.dtype).view(-1, 1, 1)
            if weight.numel() < grad.numel():
                weight = weight * scale[..., None]
            else:
                grad = grad.mul_(scale) if owned else grad * scale
        if self._is_pointwise(plan):
            # (N*H*W, out) @ (out, in)
            product = torch.mm(rows(grad), weight.view(weight.shape[0], -1))
            return from_rows(product, x_shape[0], x_shape[2], x_shape[3])
        windows = self._gathered(x_shape, plan, grad.device)
        if windows is not None:
            return input_gradient(grad, weight, windows, self.groups)
        weight = _grown(weight, plan)
        left, right, top, bottom = plan.pad
        sides = (x_shape[2] + top + bottom, x_shape[3] + left + right)
        # Pixels beyond the last window that a stride leaves over: they get no gradient.
        rest = [
            sides[a]
            - ((grad.shape[2 + a] - 1) * self.stride[a] - 2 * plan.symmetric[a])
            - (self.dilation[a] * (weight.shape[2 + a] - 1) + 1)
            for a in (0, 1)
        ]
        full = F.conv_transpose2d(grad, weight, None, self.stride, plan.symmetric, rest, self.groups, self.dilation)
        if any(plan.pad):
            full = full[:, :, top : top + x_shape[2], left : left + x_shape[3]]
        return dense(full)

    def _weight_gradient(self, grad: Tensor, x: Tensor, plan: _Plan, weight: Tensor | None) -> Tensor:
        """`weight` is the stored one: only shape and layout count, the gradient of a weight needs no weight."""
        if self._is_pointwise(plan):
            # (out, N*H*W) @ (N*H*W, in)
            return torch.mm(rows(grad).t(), rows(x)).view(grad.shape[1], x.shape[1], 1, 1)
        out, group_in = grad.shape[1], x.shape[1] // self.groups
        x_shape = tuple(x.shape)
        windows = self._gathered(x_shape, plan, grad.device)
        if windows is not None:
            return weight_gradient(grad, x, windows, self.groups)
        left, right, top, bottom = plan.grow
        shape = (out, group_in, self.kernel[0] + top + bottom, self.kernel[1] + left + right)
        depthwise = grad.device.type == "cpu" and group_in == 1 and out == self.groups > 1
        if depthwise and (max(shape[2:]) > WIDER_THAN or min(grad.shape[2:]) < SMALLER_THAN):
            return depthwise_weight_gradient(grad, x, _windows(x_shape, self))
        if weight is None or not (weight.shape == shape and weight.dtype == grad.dtype and dense(weight) is weight):
            weight = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        full = torch.ops.aten.convolution_backward(
            *(grad, F.pad(x, plan.pad) if any(plan.pad) else x, weight, None),
            *(self.stride, plan.symmetric, self.dilation, False, [0, 0], self.groups, [False, True, False]),
        )[1]
        return dense(full[:, :, top : top + self.kernel[0], left : left + self.kernel[1]])

    def _is_pointwise(self, plan: _Plan) -> bool:
        return (
            self.kernel == (1, 1)
            and self.stride == (1, 1)
            and self.groups == 1
            and plan.symmetric == (0, 0)
            and not any(plan.pad)
            and not any(plan.grow)
        )

    def out_shape(self, x_shape: Shape) -> Shape:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        sides = []
        for a in (0, 1):
            pads = self.padding.along(a, x_shape[2 + a], self.kernel[a], self.stride[a], self.dilation[a])
            span = self.dilation[a] * (self.kernel[a] - 1) + 1
            sides.append((x_shape[2 + a] + sum(pads) - span) // self.stride[a] + 1)
        return (x_shape[0], self.out_channels, *sides)

    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """The input where the weight moves; one bit an element of the output where there is an activation."""
        masked = self.activation is not None and needs.any
        bits = mask_bytes(math.prod(self.out_shape(x_shape))) if masked else 0
        return Keeps(input=self.recipe.moves_weight(needs.tensors), extra_bytes=bits)


def _grown(weight: Tensor, plan: _Plan) -> Tensor:
    """The weight in channels-last order, with the plan's rows and columns of zeros."""
    return dense(F.pad(weight, plan.grow) if any(plan.grow) else weight)
