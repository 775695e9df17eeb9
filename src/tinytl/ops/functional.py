"""The lean operations as functions, one call each, with the argument names of torch.nn.functional.

Each is exact and differentiable once; `tinytl.ops.chain` runs several as one. Images are (N, C, H, W).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ._weights import WeightRecipe
from .activation import Activation
from .batch_norm import FrozenBatchNorm
from .chain import chain
from .conv import Conv2d, Padding
from .group_norm import GroupNorm
from .linear import Linear
from .max_pool import MaxPool2d
from .pool import AdaptiveAvgPool2d, AvgPool2d, GlobalMean
from .smooth_activation import Kind, SmoothActivation
from .squeeze_excite import SqueezeExcite
from .upsample import UpsampleBilinear

Pair = tuple[int, int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | Padding = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    activation: Activation | None = None,
    standardize: bool = False,
) -> Tensor:
    """Convolution, with weight standardization before it and an activation behind it if asked.

    Keeps `x` where `weight` requires a gradient, and one bit an output element for the activation.
    `padding` is symmetric, or a `Padding` with a number for each side or TensorFlow's SAME.
    """
    if not isinstance(padding, Padding):
        padding = Padding.symmetric(*_pair(padding))
    op = Conv2d(
        (weight.shape[2], weight.shape[3]),
        _pair(stride),
        padding,
        _pair(dilation),
        groups,
        weight.shape[0],
        WeightRecipe(standardize),
        activation,
    )
    return chain(x, [(op, (weight, bias))])


def conv2d_norm(
    x: Tensor,
    weight: Tensor,
    norm: tuple[Tensor | None, Tensor | None, Tensor, Tensor],
    eps: float,
    stride: int | Pair = 1,
    padding: int | Pair | Padding = 0,
    groups: int = 1,
    *,
    activation: Activation | None = None,
) -> Tensor:
    """Convolution and frozen batch norm `norm` = (gamma, beta, mean, var), each (C_out,), as one convolution.

    Keeps `x` where `weight` or gamma requires a gradient.
    """
    if not isinstance(padding, Padding):
        padding = Padding.symmetric(*_pair(padding))
    kernel = (weight.shape[2], weight.shape[3])
    recipe = WeightRecipe(norm_eps=eps)
    op = Conv2d(kernel, _pair(stride), padding, (1, 1), groups, weight.shape[0], recipe, activation)
    return chain(x, [(op, (weight, None, *norm))])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x w^T + b`; keeps `x` where `weight` requires a gradient."""
    return chain(x, [(Linear(weight.shape[0]), (weight, bias))])


def frozen_batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm by fixed statistics; keeps `x` where `weight` (the scale) requires a gradient."""
    return chain(x, [(FrozenBatchNorm(eps), (weight, bias, mean, var))])


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Group norm; keeps `x`, and nothing else: it runs again in backward."""
    return chain(x, [(GroupNorm(groups, eps), (weight, bias))])


def relu(x: Tensor) -> Tensor:
    """max(x, 0); keeps one bit an element."""
    return chain(x, [(Activation(), ())])


def relu6(x: Tensor) -> Tensor:
    """min(max(x, 0), 6); keeps one bit an element."""
    return chain(x, [(Activation(hi=6.0), ())])


def leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    """`x` where positive, `negative_slope * x` elsewhere; keeps one bit an element."""
    return chain(x, [(Activation(slope=negative_slope), ())])


def hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """min(max(x, min_val), max_val); keeps one bit an element."""
    return chain(x, [(Activation(min_val, max_val), ())])


def smooth_activation(x: Tensor, kind: Kind, alpha: float = 1.0) -> Tensor:
    """Hard-swish, SiLU, GELU and their like by `kind` (`alpha` is ELU's); keeps `x`."""
    return chain(x, [(SmoothActivation(kind, alpha), ())])


def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: Kind | Literal["relu"] = "relu",
    gate: Kind = "sigmoid",
) -> Tensor:
    """`x` times gate(act(mean(x) w1^T + b1) w2^T + b2), a number a channel; keeps `x`."""
    return chain(x, [(SqueezeExcite(act, gate), (w1, b1, w2, b2))])


def max_pool2d(
    x: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling over windows of 256 pixels at most; keeps one byte an output element."""
    kernel = _pair(kernel_size)
    strides = kernel if stride is None else _pair(stride)
    return chain(x, [(MaxPool2d(kernel, strides, _pair(padding), _pair(dilation), ceil_mode), ())])


def adaptive_avg_pool2d(x: Tensor, output_size: int | tuple[int | None, int | None]) -> Tensor:
    """Average pooling to a size; keeps nothing."""
    size = (output_size, output_size) if isinstance(output_size, int) else output_size
    return chain(x, [(AdaptiveAvgPool2d(size), ())])


def avg_pool2d(
    x: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling; keeps nothing."""
    kernel = _pair(kernel_size)
    op = AvgPool2d(
        kernel,
        kernel if stride is None else _pair(stride),
        _pair(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    return chain(x, [(op, ())])


def global_mean(x: Tensor, keepdim: bool = False) -> Tensor:
    """Mean over H and W; keeps nothing."""
    return chain(x, [(GlobalMean(keepdim), ())])


def upsample_bilinear(x: Tensor, size: Pair) -> Tensor:
    """Bilinear interpolation to `size`, corners not aligned; keeps nothing."""
    return chain(x, [(UpsampleBilinear(size), ())])


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value
