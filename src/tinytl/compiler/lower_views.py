"""Operators that move nothing: views, copies, repeated vectors, and zeros around an image that wait for its reader."""

from __future__ import annotations

from typing import Any

import torch

from tinytl.ops._ghost import Ghost

from .lower_call import Arguments, AtenLowering, Rule
from .lowering import Value

_aten: Any = torch.ops.aten


def _same(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    x = a["self"]
    return lowering.value(x) if x.shape == out.shape and x.dtype == out.dtype else None


def _view(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    """The same tensor, a vector in another shape, or an image flattened."""
    x, value = a["self"], lowering.value(a["self"])
    if value is None or x.dtype != out.dtype or value.form == "spread":
        return None
    if x.shape == out.shape:
        return value
    if any(value.pad) or out.shape[0] != x.shape[0]:
        return None
    height, width, channels = lowering.b.shape(value.number)
    sides = tuple(out.shape[1:])
    if height == width == 1:
        first = sides[:1] == (channels,) and set(sides[1:]) <= {1}
        return Value(value.number) if first else None
    if value.form == "image" and sides == (channels * height * width,):
        return Value(value.number, "flat")
    back = value.form == "flat" and sides == (channels, height, width)
    return Value(value.number) if back else None


def _expand(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    x, value = a["self"], lowering.plain(a["self"])
    if value is None or x.shape == out.shape:
        return value
    spread = out.dim() == 4 and tuple(x.shape) == (*out.shape[:2], 1, 1) and lowering.is_vector(value)
    return Value(value.number, "spread") if spread else None


def _pad(lowering: AtenLowering, a: Arguments, out: Ghost) -> Value | None:
    """Zeros around an image wait for the convolution that takes it."""
    value, sides = lowering.value(a["self"]), list(a["pad"])
    if value is None or value.form != "image" or a["self"].dim() != 4 or a["value"] != 0 or min(sides) < 0:
        return None
    left, right, top, bottom = (*sides, 0, 0, 0, 0)[:4]
    if any(sides[4:]):
        return None
    pad = tuple(old + new for old, new in zip(value.pad, (top, bottom, left, right), strict=True))
    return Value(value.number, "image", (pad[0], pad[1], pad[2], pad[3]))


VIEWS: dict[Any, Rule] = {
    _aten.constant_pad_nd.default: _pad,
    **dict.fromkeys(
        (_aten.alias.default, _aten.detach.default, _aten.clone.default, _aten._to_copy.default, _aten.slice.Tensor),
        _same,
    ),
    **dict.fromkeys(
        (
            *(_aten.view.default, _aten._unsafe_view.default, _aten._reshape_alias.default, _aten.unsqueeze.default),
            *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims),
        ),
        _view,
    ),
    _aten.expand.default: _expand,
}
"""Operator -> its rule."""
