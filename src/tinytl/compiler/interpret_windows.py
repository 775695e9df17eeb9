"""The ops with a window that slides over the image: convolution and pooling; adaptive pooling and upsampling with them.

Averages are separable, so average pooling and its kin are two small matrices, y = rows x columns^T for each channel,
and their gradients the transposed ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .interpret_call import Call, OpFunction, channels_first, channels_last, over_channels

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Side:
    """A window along one side of the image: kernel, step, zeros before and after, dilation."""

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int


def _sides(call: Call) -> tuple[Side, Side]:
    number = call.number
    return (
        Side(number("kh"), number("sh"), number("top"), number("bottom"), number("dh")),
        Side(number("kw"), number("sw"), number("left"), number("right"), number("dw")),
    )


# ---- convolution


def _filters(call: Call) -> Tensor:
    """The weight as PyTorch has it, (O, I / groups, kh, kw)."""
    return _as_torch(call.weight(), bool(call.number("depthwise")))


def _as_torch(weight: Tensor, depthwise: bool) -> Tensor:
    return weight.permute(2, 0, 1)[:, None] if depthwise else weight.permute(0, 3, 1, 2)


def _padded(call: Call, x: Tensor) -> Tensor:
    """(n, H, W, C) -> (n, C, H, W) with zeros around it."""
    rows, columns = _sides(call)
    return F.pad(channels_first(x), (columns.before, columns.after, rows.before, rows.after))


def _options(call: Call) -> dict[str, object]:
    rows, columns = _sides(call)
    return {
        "stride": (rows.stride, columns.stride),
        "dilation": (rows.dilation, columns.dilation),
        "groups": call.number("groups"),
    }


def _conv(call: Call) -> Results:
    z = channels_last(F.conv2d(_padded(call, call["x"]), _filters(call), None, **_options(call)))  # type: ignore[arg-type]
    bias, residual = call.get("bias"), call.get("residual")
    if bias is not None:
        z = z + bias
    if residual is not None:
        z = z + residual
    return call.act(z, {})


def _conv_dx(call: Call) -> Results:
    grad, (rows, columns) = call["grad"], _sides(call)
    height, width, channels = call.shape("y")
    wide = (call.images, channels, height + rows.before + rows.after, width + columns.before + columns.after)
    options = _options(call)
    full = torch.nn.grad.conv2d_input(wide, _filters(call), channels_first(grad), **options)  # type: ignore[arg-type]
    y = channels_last(full[:, :, rows.before : rows.before + height, columns.before : columns.before + width])
    other = call.get("other")
    if other is not None:
        y = y + other
    y = call.unmasked(y)
    return {"y": y, "bias": over_channels(y)}


def _conv_dw(call: Call) -> Results:
    depthwise, shape = bool(call.number("depthwise")), call.shape("w")
    filters = (shape[2], 1, *shape[:2]) if depthwise else (shape[0], shape[3], *shape[1:3])
    x, grad = _padded(call, call["x"]), channels_first(call["grad"])
    found = torch.nn.grad.conv2d_weight(x, filters, grad, **_options(call))  # type: ignore[arg-type]
    return {"w": found[:, 0].permute(1, 2, 0) if depthwise else found.permute(0, 2, 3, 1)}


# ---- averages


def _inside(side: Side, size: int, outs: int) -> tuple[Tensor, Tensor]:
    """Of a sliding window: (outs, size) how often each pixel is in it; (outs,) its pixels, those of the padding too."""
    places = torch.arange(outs)[:, None] * side.stride - side.before + torch.arange(side.kernel) * side.dilation
    there = (places >= 0) & (places < size)
    matrix = torch.zeros(outs, size, dtype=torch.float64)
    matrix.scatter_add_(1, places.clamp(0, size - 1), there.double())
    return matrix, (places < size + side.after).double().sum(1)


def _pool_matrices(call: Call, image: tuple[int, ...], pooled: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(H', H) and (W', W) of average pooling."""
    found, divisor = [], call.number("divisor")
    for a, side in enumerate(_sides(call)):
        matrix, pixels = _inside(side, image[a], pooled[a])
        if not divisor:
            matrix = matrix / (pixels if call.number("include_pad") else matrix.sum(1))[:, None]
        elif a == 0:
            matrix = matrix / divisor
        found.append(matrix.to(call.dtype))
    return found[0], found[1]


def _adaptive_matrices(call: Call, image: tuple[int, ...], pooled: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(H', H) and (W', W): the mean over [floor(i H / H'), ceil((i + 1) H / H'))."""
    found = []
    for size, outs in zip(image[:2], pooled[:2], strict=True):
        matrix = torch.zeros(outs, size, dtype=torch.float64)
        for i in range(outs):
            begin, end = i * size // outs, -(-(i + 1) * size // outs)
            matrix[i, begin:end] = 1.0 / (end - begin)
        found.append(matrix.to(call.dtype))
    return found[0], found[1]


def _apply(rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    """(H', H), (W', W), (n, H, W, C) -> (n, H', W', C)."""
    return torch.einsum("ij,kl,njlc->nikc", rows, columns, x).contiguous()


def _with_other(call: Call, y: Tensor) -> Results:
    other = call.get("other")
    return {"y": y if other is None else y + other}


def _avg_pool(call: Call) -> Results:
    return {"y": _apply(*_pool_matrices(call, call.shape("x"), call.shape("y")), call["x"])}


def _avg_pool_grad(call: Call) -> Results:
    rows, columns = _pool_matrices(call, call.shape("y"), call.shape("grad"))
    return _with_other(call, _apply(rows.T, columns.T, call["grad"]))


def _adaptive_pool(call: Call) -> Results:
    return {"y": _apply(*_adaptive_matrices(call, call.shape("x"), call.shape("y")), call["x"])}


def _adaptive_pool_grad(call: Call) -> Results:
    rows, columns = _adaptive_matrices(call, call.shape("y"), call.shape("grad"))
    return _with_other(call, _apply(rows.T, columns.T, call["grad"]))


# ---- the largest


def _max_pool(call: Call) -> Results:
    """Of equal pixels the first wins, row by row; a NaN over everything, the last one over the others."""
    x = call["x"]
    pooled = (call.images, *call.shape("y"))
    best = x.new_full(pooled, -math.inf)
    which = torch.full(pooled, -1, dtype=torch.int64)
    for tap, there, rows, columns in _taps(call, tuple(x.shape[1:3]), pooled[1:3]):
        pixels = x[:, rows][:, :, columns]
        # the first pixel that is inside the image wins where all are -inf
        better = there[None, :, :, None] & ((pixels > best) | pixels.isnan() | (which < 0))
        best, which = torch.where(better, pixels, best), torch.where(better, tap, which)
    return {"y": best, "which": which.to(torch.uint8)}


def _max_pool_grad(call: Call) -> Results:
    grad, which, image = call["grad"], call["which"], call.shape("y")
    y = grad.new_zeros(call.images, *image)
    for tap, there, rows, columns in _taps(call, image[:2], tuple(grad.shape[1:3])):
        won = there[None, :, :, None] & (which == tap)
        images, i, j, channels = won.nonzero(as_tuple=True)
        y.index_put_((images, rows[i], columns[j], channels), grad[won], accumulate=True)
    return {"y": y}


def _taps(call: Call, image: tuple[int, ...], outs: tuple[int, ...]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Each of the window's pixels: its number, (H', W') whether it is inside, and its rows (H',) and columns (W',)."""
    rows, columns = _sides(call)
    for down in range(rows.kernel):
        for right in range(columns.kernel):
            places = [
                torch.arange(out) * side.stride - side.before + tap * side.dilation
                for side, tap, out in ((rows, down, outs[0]), (columns, right, outs[1]))
            ]
            inside = [(place >= 0) & (place < size) for place, size in zip(places, image, strict=True)]
            clamped = [place.clamp(0, size - 1) for place, size in zip(places, image, strict=True)]
            yield down * columns.kernel + right, inside[0][:, None] & inside[1], clamped[0], clamped[1]


# ---- upsampling


def _upsample(call: Call) -> Results:
    size = call.shape("y")[:2]
    y = channels_last(F.interpolate(channels_first(call["x"]), size, mode="bilinear", align_corners=False))
    residual = call.get("residual")
    return {"y": y if residual is None else y + residual}


def _upsample_grad(call: Call) -> Results:
    height, width, channels = call.shape("y")
    grad = channels_first(call["grad"]).contiguous()
    back = torch.ops.aten.upsample_bilinear2d_backward(
        grad, list(grad.shape[2:]), [call.images, channels, height, width], False
    )
    return {"y": channels_last(back)}


WINDOW_OPS: dict[str, OpFunction] = {
    "conv": _conv,
    "conv_dx": _conv_dx,
    "conv_dw": _conv_dw,
    "avg_pool": _avg_pool,
    "avg_pool_grad": _avg_pool_grad,
    "adaptive_pool": _adaptive_pool,
    "adaptive_pool_grad": _adaptive_pool_grad,
    "max_pool": _max_pool,
    "max_pool_grad": _max_pool_grad,
    "upsample": _upsample,
    "upsample_grad": _upsample_grad,
}
