"""Shapes and strides of what PyTorch's CPU operators return, for those whose own rule is slow or of another device.

PyTorch's rules for the meta device serve all others. A convolution's takes ten times as long as the rest of its
description, and that of group norm gives a single image strides that no CPU operator gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def multiply_adds(func: Any, args: Sequence[Any], out: Any) -> int:
    """Of a convolution or a matrix product (of a convolution's backward: for each gradient that is asked for)."""
    if func is _aten.convolution.default:
        # each pixel meets every tap: one of the output, or of the input where that is the smaller side
        return _pixels(args[0] if args[6] else out) * args[1].numel()
    if func is _aten.convolution_backward.default:
        return _pixels(args[0]) * args[2].numel() * sum(args[10][:2])
    if func is _aten.mm.default or func is _aten.mm.out:
        return args[0].numel() * args[1].shape[1]
    if func is _aten.addmm.default or func is _aten.addmm_.default:
        return args[1].numel() * args[2].shape[1]
    return 0


def _pixels(x: Tensor) -> int:
    return math.prod((x.shape[0], *x.shape[2:]))


def _channels_last(shape: Sequence[int], like: Tensor) -> Tensor:
    n, c, h, w = shape
    return torch.empty_strided((n, c, h, w), (c * h * w, 1, w * c, c), dtype=like.dtype, device="meta")


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    if not _is_channels_last(x) and not _is_channels_last(weight):
        return _aten.convolution.default(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    sides = []
    for axis in (0, 1):
        span = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        if transposed:
            sides.append((x.shape[2 + axis] - 1) * stride[axis] - 2 * padding[axis] + span + output_padding[axis])
        else:
            sides.append((x.shape[2 + axis] + 2 * padding[axis] - span) // stride[axis] + 1)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return _channels_last((x.shape[0], channels, *sides), x)


def _group_norm(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, n: int, c: int, sides: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = _channels_last(x.shape, x) if _is_channels_last(x) else torch.empty_like(x)
    return y, x.new_empty((n, groups)), x.new_empty((n, groups))


def _bilinear(x: Tensor, size: Sequence[int], *rest: Any) -> Tensor:
    if not _is_channels_last(x):
        return _aten.upsample_bilinear2d.default(x, size, *rest)
    return _channels_last((*x.shape[:2], *size), x)


def _bilinear_backward(grad: Tensor, size: Sequence[int], shape: Sequence[int], *rest: Any) -> Tensor:
    if not _is_channels_last(grad):
        return _aten.upsample_bilinear2d_backward.default(grad, size, shape, *rest)
    return _channels_last(shape, grad)


def _group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _, c, _, _, wanted = rest
    grad_x = _channels_last(x.shape, x) if _is_channels_last(x) else torch.empty_like(x)
    grad_gamma, grad_beta = (x.new_empty((c,)) if want else None for want in wanted[1:])
    return grad_x if wanted[0] else None, grad_gamma, grad_beta


def _elementwise(slow: Any) -> Callable[..., Tensor]:
    """The rule of an operator on two operands, one of which, dense, has the shape of the result."""

    def rule(x: Tensor, other: Any = None, **options: Any) -> Tensor:
        like = _shaped_like(x, other)
        if like is None or options or not _is_dense(like) or not _covers(like, x) or not _covers(like, other):
            return slow(x, *(() if other is None else (other,)), **options)
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")

    return rule


def _shaped_like(x: Any, other: Any) -> Tensor | None:
    """The operand that the result is shaped like, if that is plain to see."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        return None
    if not isinstance(other, Tensor) or other.dim() == 0:
        return x
    if x.shape == other.shape:
        return x if x.stride() == other.stride() else None
    return x if x.numel() > other.numel() else other


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or _is_channels_last(x)


def _covers(like: Tensor, x: Any) -> bool:
    """Whether `x` adds no dimension to those of `like`, nor another type."""
    if not isinstance(x, Tensor) or x is like:
        return True
    if x.dtype != like.dtype or x.dim() > like.dim():
        return False
    sides = zip(reversed(like.shape), reversed(x.shape), strict=False)
    return all(mine in (1, side) for side, mine in sides)


def _first(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of an operator in place."""
    return x


def _reduction(slow: Any) -> Callable[..., Tensor]:
    """The rule of a sum or a mean over some dimensions."""

    def rule(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, **options: Any) -> Tensor:
        gone = {dim % x.dim() for dim in dims or ()}
        if not gone or options or not x.dtype.is_floating_point:
            return slow(x, dims, keepdim, **options)
        shape = [1 if dim in gone else size for dim, size in enumerate(x.shape) if keepdim or dim not in gone]
        made = torch.empty(shape, dtype=x.dtype, device="meta")
        return made if min(shape[1:], default=1) == max(shape[1:], default=1) == 1 else slow(x, dims, keepdim)

    return rule


def _std(x: Tensor, dims: Sequence[int] | None = None, *, keepdim: bool = False, **options: Any) -> Tensor:
    return RULES[_aten.mean.dim](x, dims, keepdim)


def _std_mean(x: Tensor, dims: Sequence[int] | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    return _std(x, dims, **options), _std(x, dims, **options)


def _to_copy(x: Tensor, **options: Any) -> Tensor:
    """A move to the CPU is none there, though the meta tensor that stands for one makes PyTorch ask for it."""
    if options.pop("device", None) is not None and options.get("dtype") in (None, x.dtype):
        return x
    return _aten._to_copy.default(x, **options)


def _new_empty(x: Tensor, size: Sequence[int], **options: Any) -> Tensor:
    return torch.empty(size, dtype=options.get("dtype") or x.dtype, device="meta")


def _in_place(*args: Any, **kwargs: Any) -> None:
    """An optimizer's pass over lists of tensors, which returns nothing."""


_ELEMENTWISE = (
    _aten.mul.Tensor,
    _aten.mul.Scalar,
    _aten.add.Tensor,
    _aten.sub.Tensor,
    _aten.div.Tensor,
    _aten.div.Scalar,
    _aten.rsqrt.default,
    _aten.sqrt.default,
    _aten.neg.default,
)

_OVERWRITING = (
    _aten.mul_.Tensor,
    _aten.add_.Tensor,
    _aten.sub_.Tensor,
    _aten.div_.Tensor,
    _aten.addcmul_.default,
    _aten.copy_.default,
)

RULES: dict[Any, Callable[..., Any]] = {
    _aten.convolution.default: _convolution,
    _aten.native_group_norm.default: _group_norm,
    _aten.upsample_bilinear2d.default: _bilinear,
    _aten.upsample_bilinear2d_backward.default: _bilinear_backward,
    _aten.native_group_norm_backward.default: _group_norm_backward,
    _aten.new_empty.default: _new_empty,
    _aten._to_copy.default: _to_copy,
    _aten.std.correction: _std,
    _aten.std_mean.correction: _std_mean,
    **{op: _elementwise(op) for op in _ELEMENTWISE},
    **dict.fromkeys(_OVERWRITING, _first),
    **{op: _reduction(op) for op in (_aten.mean.dim, _aten.sum.dim_IntList)},
    _aten._fused_adam_.default: _in_place,
    _aten._fused_sgd_.default: _in_place,
}
