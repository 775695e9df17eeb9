"""From lean operations (`tinytl.ops`) to instructions.

A `Builder` holds the program while it grows; `lower_stage` puts one operation of a chain behind what is there. The
operation that computes in the lab is the one that is read here, so that there is no second description of a network.

A windowed instruction carries the padding that its layer asks for. Where a pool rounds its output's sides up
(`ceil_mode`), its last windows reach over that padding: how many windows there are is what its output's shape says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tinytl.ops._op import Op, Shape, Tensors
from tinytl.ops._weights import WeightRecipe
from tinytl.ops.activation import Activation
from tinytl.ops.batch_norm import FrozenBatchNorm
from tinytl.ops.conv import Conv2d
from tinytl.ops.group_norm import GroupNorm
from tinytl.ops.linear import Linear
from tinytl.ops.max_pool import MaxPool2d
from tinytl.ops.pool import AdaptiveAvgPool2d, AvgPool2d, GlobalMean
from tinytl.ops.smooth_activation import SmoothActivation
from tinytl.ops.squeeze_excite import SqueezeExcite
from tinytl.ops.upsample import UpsampleBilinear

from .lower_builder import Builder
from .lower_weights import Filters, filters_of, scale_and_shift
from .op_table import SMOOTH

NO_ACTIVATION = {"lo": -math.inf, "hi": math.inf, "slope": 0.0}
_WINDOW = ("kh", "kw", "sh", "sw", "top", "left", "bottom", "right", "dh", "dw")


@dataclass(frozen=True)
class Value:
    """How a tensor of the forward stands for one of the program.

    Attributes:
        number: of the program's tensor, (H, W, C).
        form: 'image': (N, C, H, W), or where H = W = 1 any shape with N first and only C beside it above 1;
            'flat': (N, C H W), channels outermost; 'spread': a vector repeated over an image's pixels.
        pad: zeros around the image that the forward has laid there: top, bottom, left, right.
    """

    number: int
    form: Literal["image", "flat", "spread"] = "image"
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def plain(self) -> bool:
        """Whether it is the program's tensor as it is."""
        return self.form == "image" and not any(self.pad)


def lower_stage(b: Builder, op: Op, tensors: Tensors, x: Value, x_shape: Shape) -> Value:
    """Put `op` on `x`, whose shape in PyTorch's order is `x_shape`, behind what is there.

    Raises:
        UnsupportedLayerError: an operation that no instruction stands for, or on a tensor of another shape.
    """
    lower = _STAGES.get(type(op))
    if lower is None:
        raise b.refusal(type(op).__name__)
    takes_more = isinstance(op, (Conv2d, Linear))  # the one padded images, the other flattened ones
    if not x.plain and not takes_more:
        raise b.refusal(type(op).__name__, "takes a tensor that was padded, flattened or repeated")
    if isinstance(op, _ON_IMAGES) and len(x_shape) != 4:
        raise b.refusal(type(op).__name__, f"takes {list(x_shape)}, expected images (N, C, H, W)")
    return lower(b, op, tensors, x, x_shape)


# ---------------------------------------------------------------- convolutions


def _conv(b: Builder, op: Conv2d, tensors: Tensors, x: Value, x_shape: Shape) -> Value:
    if x.form != "image":
        raise b.refusal("Conv2d", "takes a tensor that was flattened or repeated")
    channels = x_shape[1]
    depthwise = op.groups == channels == op.out_channels and op.groups > 1
    filters = filters_of(b, op.recipe, tensors, depthwise)
    height, width = op.out_shape(x_shape)[2:]
    sides = [op.padding.along(a, x_shape[2 + a], op.kernel[a], op.stride[a], op.dilation[a]) for a in (0, 1)]
    top, bottom, left, right = (a + b for a, b in zip(x.pad, (*sides[0], *sides[1]), strict=True))
    window = (*op.kernel, *op.stride, top, left, bottom, right, *op.dilation)
    shape = (height, width, op.out_channels)
    return Value(_convolve(b, x.number, filters, shape, window, op.groups, op.activation))


def _convolve(
    b: Builder,
    x: int,
    filters: Filters,
    shape: Shape,
    window: tuple[int, ...],
    groups: int = 1,
    activation: Activation | None = None,
) -> int:
    y = b.activation("conv", shape)
    act = NO_ACTIVATION if activation is None else _act(activation)
    attributes = {**dict(zip(_WINDOW, window, strict=True)), "groups": groups, "depthwise": int(filters.depthwise)}
    b.emit("conv", {**attributes, **act}, x=x, w=filters.w, table=filters.table, bias=filters.bias, y=y)
    return y


def _linear(b: Builder, op: Linear, tensors: Tensors, x: Value, x_shape: Shape) -> Value:
    """A convolution of one pixel; behind a flattened image one whose kernel is that image."""
    height, width, channels = b.shape(x.number)
    if len(x_shape) != 2 or x.form == "spread" or any(x.pad):
        raise b.refusal("Linear", f"takes {list(x_shape)}, expected (N, C)")
    recipe = WeightRecipe(packing=op.packing)
    filters = filters_of(b, recipe, tensors, False, view=(op.out_features, channels, height, width))
    return Value(_convolve(b, x.number, filters, (1, 1, op.out_features), _whole(height, width)))


def _whole(height: int, width: int) -> tuple[int, ...]:
    """A window that is the whole image."""
    return (height, width, 1, 1, 0, 0, 0, 0, 1, 1)


def _squeeze_excite(b: Builder, op: SqueezeExcite, tensors: Tensors, x: Value, x_shape: Shape) -> Value:
    tables: list[Tensor | None] = list(tensors[4:])
    s = _adaptive_to(b, x, (1, 1)).number
    for which, kind in enumerate((op.act, op.gate)):
        packing = op.packings[which]
        weight, bias = tensors[2 * which], tensors[2 * which + 1]
        assert weight is not None
        table = () if packing is None else (tables.pop(0),)
        view = (weight.shape[0], weight.shape[1], 1, 1)
        filters = filters_of(b, WeightRecipe(packing=packing), (weight, bias, *table), False, view=view)
        relu = Activation() if kind == "relu" else None
        s = _convolve(b, s, filters, (1, 1, weight.shape[0]), _whole(1, 1), activation=relu)
        if kind != "relu":
            s = _smooth(b, SmoothActivation(kind), (), Value(s), ()).number
    return gate(b, x, Value(s))


def gate(b: Builder, x: Value, s: Value) -> Value:
    """`x` times the vector `s`."""
    y = b.activation("gate", b.shape(x.number))
    b.emit("gate", x=x.number, s=s.number, y=y)
    return Value(y)


# ---------------------------------------------------------------- pixel by pixel


def _act(op: Activation) -> dict[str, float]:
    return {"lo": float(op.lo), "hi": float(op.hi), "slope": float(op.slope)}


def _activation(b: Builder, op: Activation, tensors: Tensors, x: Value, x_shape: Shape) -> Value:
    y = b.activation("act", b.shape(x.number))
    b.emit("activation", _act(op), x=x.number, y=y)
    return Value(y)


def _smooth(b: Builder, op: SmoothActivation, tensors: Tensors, x: Value, x_shape: Shape) -> Value:
    y = b.activation(op.kind, b.shape(x.number))
    b.emit("smooth", {"kind": SMOOTH.index(op.kind), "alpha": float(op.alpha)}, x=x.number, y=y)
    return Value(y)


def _group_norm(b: Builder, op: GroupNorm, tensors: Tensors, x: Value, x_shape: Shape) -> Value:
    gamma, beta = (b.vector(t) for t in tensors)
    y = b.activation("group_norm", b.shape(x.number))
    attributes = {"groups": op.groups, "eps": op.eps, **NO_ACTIVATION}
    b.emit("group_norm", attributes, x=x.number, gamma=gamma, beta=beta, y=y)
    return Value(y)


def _frozen_batch_norm(b: Builder, op: FrozenBatchNorm, tensors: Tensors, x: Value, x_shape: Shape) -> Value:
    scale, shift = scale_and_shift(b, tensors, op.eps)
    return affine(b, x, scale, shift)


def affine(b: Builder, x: Value, scale: int, shift: int | None) -> Value:
    """`x scale + shift`, by channel."""
    y = b.activation("affine", b.shape(x.number))
    b.emit("affine", NO_ACTIVATION, x=x.number, scale=scale, shift=shift, y=y)
    return Value(y)


def add(b: Builder, left: Value, right: Value) -> Value:
    """The sum of two images of one shape."""
    y = b.activation("add", b.shape(left.number))
    b.emit("add", NO_ACTIVATION, a=left.number, b=right.number, y=y)
    return Value(y)


def dropout(b: Builder, x: Value, p: float) -> Value:
    """Dropout, the identity in evaluation; it gets the next number."""
    y = b.activation("dropout", b.shape(x.number))
    b.emit("dropout", {"p": float(p), "number": b.next_dropout()}, x=x.number, y=y)
    return Value(y)


# ---------------------------------------------------------------- pooling


def _pooled(b: Builder, op: Any, x_shape: Shape, what: str, **more: int) -> tuple[int, dict[str, int]]:
    _, channels, height, width = op.out_shape(x_shape)
    (top, left), dilation = op.padding, getattr(op, "dilation", (1, 1))
    window = (*op.kernel, *op.stride, top, left, top, left, *dilation)
    return b.activation(what, (height, width, channels)), {**dict(zip(_WINDOW, window, strict=True)), **more}


def _avg_pool(b: Builder, op: AvgPool2d, tensors: Tensors, x: Value, x_shape: Shape) -> Value:
    counted = {"include_pad": int(op.count_include_pad), "divisor": op.divisor or 0}
    y, attributes = _pooled(b, op, x_shape, "avg_pool", **counted)
    b.emit("avg_pool", attributes, x=x.number, y=y)
    return Value(y)


def _max_pool(b: Builder, op: MaxPool2d, tensors: Tensors, x: Value, x_shape: Shape) -> Value:
    y, attributes = _pooled(b, op, x_shape, "max_pool")
    b.emit("max_pool", attributes, x=x.number, y=y)
    return Value(y)


def _adaptive(b: Builder, op: AdaptiveAvgPool2d | GlobalMean, tensors: Tensors, x: Value, x_shape: Shape) -> Value:
    shape = op.out_shape(x_shape)
    return _adaptive_to(b, x, (shape[2], shape[3]) if len(shape) == 4 else (1, 1))


def _adaptive_to(b: Builder, x: Value, sides: tuple[int, int]) -> Value:
    height, width, channels = b.shape(x.number)
    if sides == (height, width):  # each pixel is its own mean
        return x
    y = b.activation("mean" if sides == (1, 1) else "adaptive_pool", (*sides, channels))
    b.emit("adaptive_pool", x=x.number, y=y)
    return Value(y)


def _upsample(b: Builder, op: UpsampleBilinear, tensors: Tensors, x: Value, x_shape: Shape) -> Value:
    height, width, channels = b.shape(x.number)
    if op.size == (height, width):  # as the operation itself has it
        return x
    y = b.activation("upsample", (*op.size, channels))
    b.emit("upsample", x=x.number, y=y)
    return Value(y)


_ON_IMAGES = (Conv2d, SqueezeExcite, AvgPool2d, MaxPool2d, AdaptiveAvgPool2d, GlobalMean, UpsampleBilinear)

_STAGES: Mapping[type[Op], Callable[..., Value]] = {
    Conv2d: _conv,
    Linear: _linear,
    SqueezeExcite: _squeeze_excite,
    Activation: _activation,
    SmoothActivation: _smooth,
    GroupNorm: _group_norm,
    FrozenBatchNorm: _frozen_batch_norm,
    AvgPool2d: _avg_pool,
    MaxPool2d: _max_pool,
    AdaptiveAvgPool2d: _adaptive,
    GlobalMean: _adaptive,
    UpsampleBilinear: _upsample,
}
