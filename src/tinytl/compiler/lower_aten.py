"""PyTorch's own operators between chains, lowered: sums at the end of blocks, gates, and stock layers.

An operator that is neither named here nor in `lower_views`, or that is called with options that no instruction has, is
refused by name.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tinytl.ops._ghost import Ghost
from tinytl.ops._op import Op
from tinytl.ops.activation import Activation
from tinytl.ops.batch_norm import FrozenBatchNorm
from tinytl.ops.conv import Conv2d, Padding
from tinytl.ops.group_norm import GroupNorm
from tinytl.ops.linear import Linear
from tinytl.ops.max_pool import LARGEST_WINDOW, MaxPool2d
from tinytl.ops.pool import AdaptiveAvgPool2d, AvgPool2d
from tinytl.ops.smooth_activation import SmoothActivation
from tinytl.ops.upsample import UpsampleBilinear

from .lower_call import Arguments, AtenLowering, Rule
from .lower_views import VIEWS
from .lowering import Value, add, gate

_aten: Any = torch.ops.aten


# ---------------------------------------------------------------- arithmetic


def _add(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    if a.get("alpha", 1) != 1:
        return None
    x, y = a["self"], a["other"]
    if not isinstance(x, Ghost):
        x, y = y, x
    if isinstance(y, Ghost):
        left, right = lowering.plain(x), lowering.plain(y)
        return add(lowering.b, left, right) if left and right and x.shape == y.shape else None
    shift = lowering.by_channel(y, x)
    return None if shift is None or x.shape != out.shape else lowering.affine(x, 1.0, shift)


def _sub(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    x, y = a["self"], a["other"]
    if a.get("alpha", 1) != 1 or not isinstance(x, Ghost) or x.shape != out.shape:
        return None
    shift = lowering.by_channel(y, x)
    return None if shift is None else lowering.affine(x, 1.0, -shift)


def _rsub(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    x, y = a["self"], a["other"]
    if a.get("alpha", 1) != 1 or not isinstance(x, Ghost) or x.shape != out.shape:
        return None
    shift = lowering.by_channel(y, x)
    return None if shift is None else lowering.affine(x, -1.0, shift)


def _mul(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    x, y = a["self"], a["other"]
    if isinstance(x, Ghost) and isinstance(y, Ghost):
        return _gate(lowering, x, y, out) or _gate(lowering, y, x, out)
    if not isinstance(x, Ghost):
        x, y = y, x
    scale = lowering.by_channel(y, x)
    return None if scale is None or x.shape != out.shape else lowering.affine(x, scale, 0.0)


def _gate(lowering: AtenLowering, x: Ghost, s: Ghost, out: Ghost) -> Value | None:
    image, vector = lowering.plain(x), lowering.value(s)
    if image is None or vector is None or x.shape != out.shape or not lowering.is_vector(vector) or any(vector.pad):
        return None
    if vector.form == "spread" or tuple(s.shape) in (tuple(x.shape), (*x.shape[:2], 1, 1)):
        return gate(lowering.b, image, Value(vector.number)) if vector.number != image.number else None
    return None


def _div(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    x = a["self"]
    if not isinstance(x, Ghost) or x.shape != out.shape or a.get("rounding_mode") is not None:
        return None
    by = lowering.by_channel(a["other"], x)
    return None if by is None else lowering.affine(x, 1.0 / by, 0.0)


def _neg(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    return lowering.affine(a["self"], -1.0, 0.0) if lowering.plain(a["self"]) else None


# ---------------------------------------------------------------- activations


def _fixed(op: Op) -> Rule:
    return lambda lowering, a, out: lowering.stage(op, (), a["self"])


def _clamp(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    lo, hi = a.get("min", a.get("min_val")), a.get("max", a.get("max_val"))
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (lo, hi)):
        return None
    op = Activation(-math.inf if lo is None else float(lo), math.inf if hi is None else float(hi))
    return lowering.stage(op, (), a["self"])


def _leaky(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    slope = float(a["negative_slope"])
    return lowering.stage(Activation(slope=slope), (), a["self"]) if slope >= 0 else None


def _gelu(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    return lowering.stage(SmoothActivation("gelu" if a["approximate"] == "none" else "gelu_tanh"), (), a["self"])


def _elu(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    if a["scale"] != 1 or a["input_scale"] != 1:
        return None
    return lowering.stage(SmoothActivation("elu", float(a["alpha"])), (), a["self"])


# ---------------------------------------------------------------- layers


def _convolution(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    weight = a["weight"]
    if a["transposed"] or not isinstance(a["input"], Ghost) or isinstance(weight, Ghost) or weight.dim() != 4:
        return None
    kernel, padding = (weight.shape[2], weight.shape[3]), Padding.symmetric(*_pair(a["padding"]))
    options = (_pair(a["stride"]), padding, _pair(a["dilation"]), a["groups"], weight.shape[0])
    return lowering.stage(Conv2d(kernel, *options), (weight, a["bias"]), a["input"])


def _addmm(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    if a["beta"] != 1 or a["alpha"] != 1 or a["self"].dim() != 1 or isinstance(a["self"], Ghost):
        return None
    return _product(lowering, a["mat1"], a["mat2"], a["self"])


def _mm(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    return _product(lowering, a["self"], a["mat2"], None)


def _product(lowering: AtenLowering, x: Any, weight: Any, bias: Tensor | None) -> Value | None:
    if not isinstance(x, Ghost) or isinstance(weight, Ghost):
        return None
    return lowering.stage(Linear(weight.shape[1]), (weight.t(), bias), x)


def _batch_norm(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    if a.get("training") or a.get("running_mean") is None:
        return None
    tensors = (a["weight"], a["bias"], a["running_mean"], a["running_var"])
    return lowering.stage(FrozenBatchNorm(float(a["eps"])), tensors, a["input"])


def _group_norm(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    return lowering.stage(GroupNorm(a["group"], a["eps"]), (a["weight"], a["bias"]), a["input"])


def _mean(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    x, dims = a["self"], a["dim"] or ()
    if x.dim() != 4 or {dim % 4 for dim in dims} != {2, 3} or a.get("dtype") not in (None, x.dtype):
        return None
    return lowering.stage(AdaptiveAvgPool2d((1, 1)), (), x)


def _adaptive_pool(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    return lowering.stage(AdaptiveAvgPool2d((out.shape[2], out.shape[3])), (), a["self"])


def _avg_pool(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    kernel, stride, padding = _window(a)
    rest = (a["ceil_mode"], a["count_include_pad"], a["divisor_override"])
    return lowering.stage(AvgPool2d(kernel, stride, padding, *rest), (), a["self"])


def _max_pool(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    kernel, stride, padding = _window(a)
    if kernel[0] * kernel[1] > LARGEST_WINDOW:
        return None
    return lowering.stage(MaxPool2d(kernel, stride, padding, _pair(a["dilation"]), a["ceil_mode"]), (), a["self"])


def _window(a: Arguments) -> tuple[Any, Any, Any]:
    kernel = _pair(a["kernel_size"])
    return kernel, _pair(a["stride"]) if a["stride"] else kernel, _pair(a["padding"])


def _bilinear(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    x, size = a["self"], (out.shape[2], out.shape[3])
    for axis, scale in enumerate((a["scales_h"], a["scales_w"])):
        if scale is not None and scale * x.shape[2 + axis] != size[axis]:
            return None  # it would count pixels by another step than from size to size
    return None if a["align_corners"] else lowering.stage(UpsampleBilinear(size), (), x)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


_SMOOTH = {
    "hardswish": "hard_swish",
    "hardsigmoid": "hard_sigmoid",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "tanh": "tanh",
    "mish": "mish",
}


def _both(name: str, rule: Rule) -> dict[Any, Rule]:
    """An operator and its form in place."""
    return {getattr(_aten, name).default: rule, getattr(_aten, f"{name}_").default: rule}


RULES: dict[Any, Rule] = {
    **dict.fromkeys((_aten.add.Tensor, _aten.add_.Tensor), _add),
    **dict.fromkeys((_aten.sub.Tensor, _aten.sub_.Tensor), _sub),
    **dict.fromkeys((_aten.rsub.Tensor, _aten.rsub.Scalar), _rsub),
    **dict.fromkeys((_aten.mul.Tensor, _aten.mul_.Tensor), _mul),
    **dict.fromkeys((_aten.div.Tensor, _aten.div_.Tensor), _div),
    **_both("neg", _neg),
    **_both("relu", _fixed(Activation())),
    **_both("relu6", _fixed(Activation(hi=6.0))),
    **_both("hardtanh", _clamp),
    **_both("clamp", _clamp),
    **_both("leaky_relu", _leaky),
    **_both("gelu", _gelu),
    **_both("elu", _elu),
    **{op: rule for name, kind in _SMOOTH.items() for op, rule in _both(name, _fixed(SmoothActivation(kind))).items()},  # type: ignore[arg-type]
    _aten.convolution.default: _convolution,
    _aten.addmm.default: _addmm,
    _aten.mm.default: _mm,
    _aten.native_batch_norm.default: _batch_norm,
    _aten._native_batch_norm_legit_no_training.default: _batch_norm,
    _aten.native_group_norm.default: _group_norm,
    _aten.mean.dim: _mean,
    _aten._adaptive_avg_pool2d.default: _adaptive_pool,
    _aten.avg_pool2d.default: _avg_pool,
    _aten.max_pool2d_with_indices.default: _max_pool,
    _aten.upsample_bilinear2d.default: _bilinear,
    **VIEWS,
}
"""Operator -> its rule."""
