"""One bit an element: the passes behind ReLU, ReLU6 and LeakyReLU.

All three are `y = x` where `lo < x < hi` and a constant or a constant slope elsewhere, so the derivative needs to know
of each element only on which side it lay. Forward overwrites its argument and packs those bits in the same pass;
backward selects and, where a bias in front of the activation trains, sums over rows in the same pass.

The compiled passes serve float32 and float64 on the CPU; plain PyTorch serves everything else, a slice at a time, so
that its temporaries stay small. Both give the same bits, and the tests hold them together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._layout import rows
from ._native import KERNELS, run, serves

_CHUNKS = 32  # partial sums of a column; a fixed number, so that sums do not depend on the number of threads
_SLICE = 1 << 20  # elements that the plain path holds unpacked at a time; a multiple of 8


def mask_bytes(elements: int) -> int:
    """Bytes that the packed mask of so many elements takes: one bit each."""
    return (elements + 7) // 8


def activate_(y: Tensor, lo: float, hi: float, slope: float, keep_mask: bool) -> Tensor | None:
    """Overwrite `y` (dense layout) with the activation; return the packed mask (uint8) of `lo < y < hi` if wanted."""
    mask = torch.empty(mask_bytes(y.numel()), dtype=torch.uint8, device=y.device) if keep_mask else None
    if serves(KERNELS, y):
        run(KERNELS, "activation", y, y, y.numel(), mask, lo, hi, slope)
        return mask
    flat = rows(y).view(-1)
    for start in range(0, flat.numel(), _SLICE):
        part = flat[start : start + _SLICE]
        if mask is not None:
            first = start // 8
            outside = part <= lo  # a NaN is not outside: its gradient passes, as in PyTorch
            packed = _pack(~(outside | (part >= hi)) if hi < math.inf else ~outside)
            mask[first : first + packed.numel()] = packed
        below = part <= lo if slope else None
        bent = lo + slope * (part - lo) if slope else None
        part.clamp_(lo, hi)
        if below is not None and bent is not None:
            torch.where(below, bent, part, out=part)
    return mask


def masked_grad(
    grad: Tensor, mask: Tensor, slope: float, *, want_sum: bool, in_place: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient through an activation: `grad` (dense) where the bit is set, `slope * grad` elsewhere.

    Returns it, in `grad` itself if `in_place`, and its sum over everything but channels (C,) if `want_sum`.
    """
    out = grad if in_place else torch.empty_like(grad)
    if serves(KERNELS, grad):
        count, channels = rows(grad).shape
        sums = grad.new_empty(channels) if want_sum else None
        partial = grad.new_empty(_CHUNKS * channels) if want_sum else None
        run(KERNELS, "masked_grad", grad, grad, out, count, channels, mask, slope, partial, _CHUNKS, sums)
        return out, sums
    source, target = rows(grad).view(-1), rows(out).view(-1)
    for start in range(0, source.numel(), _SLICE):
        part = source[start : start + _SLICE]
        on = _unpack(mask[start // 8 : start // 8 + mask_bytes(part.numel())], part.numel())
        torch.where(on, part, part * slope if slope else part.new_zeros(()), out=target[start : start + _SLICE])
    return out, rows(out).sum(0) if want_sum else None


def _pack(bits: Tensor) -> Tensor:
    """Booleans (n,) as bytes (ceil(n / 8),), bit j of byte i for element 8 i + j."""
    missing = -bits.numel() % 8
    if missing:
        bits = torch.nn.functional.pad(bits, (0, missing))
    octets = bits.view(-1, 8).to(torch.uint8)
    return (octets << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, count: int) -> Tensor:
    """The reverse of `_pack`: bytes as `count` booleans."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts).bitwise_and_(1).view(-1)[:count].bool()
