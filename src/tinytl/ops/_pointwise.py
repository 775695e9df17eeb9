"""1x1 convolutions as matrix products, with a packed weight some filters at a time: never the whole weight expanded.

    y[:, F] = x expand(w[F])^T        dL/dx = sum over F of dL/dy[:, F] expand(w[F])        a piece F of the filters

The late layers of a network have few pixels and many filters: their expanded weight would be the largest tensor of a
step that runs one image at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._layout import rows
from .packing import Packing

PIECE_BYTES = 1 << 18
"""Most bytes of a weight that are expanded at a time, but for one filter that has more."""


LAID_OUT_AGAIN = 1 << 17
"""Bytes of a weight from which on a product is taken: several threads of oneDNN's would work on a copy of it."""


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """Images (N, in, H, W), weight (out, in, 1, 1) -> (N, out, H, W); allocates that alone."""
    n, _, h, w = x.shape
    shape = (n, weight.shape[0], h, w)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    torch.mm(rows(x), weight.view(weight.shape[0], -1).t(), out=rows(y))
    return y


def in_pieces(codes: Tensor, table: Tensor) -> bool:
    """Whether the weight of these codes is too large to be expanded at once."""
    return codes.numel() * table.element_size() > PIECE_BYTES


def product(x: Tensor, codes: Tensor, table: Tensor, packing: Packing) -> Tensor:
    """Images (N, in, H, W), codes (out, in, 1, 1) -> (N, out, H, W); allocates that and one piece of the weight."""
    n, _, h, w = x.shape
    shape = (n, codes.shape[0], h, w)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    pixels, made = rows(x), rows(y)
    for part, weight in _pieces(codes, table, packing):
        torch.mm(pixels, weight.t(), out=made[:, part])
        del weight
    return y


def input_gradient(grad: Tensor, codes: Tensor, table: Tensor, packing: Packing) -> Tensor:
    """(pixels, out), codes (out, in, 1, 1) -> (pixels, in); allocates that and one piece of the weight."""
    made: Tensor | None = None
    for part, weight in _pieces(codes, table, packing):
        made = torch.mm(grad[:, part], weight) if made is None else made.addmm_(grad[:, part], weight)
        del weight
    assert made is not None
    return made


def _pieces(codes: Tensor, table: Tensor, packing: Packing) -> Iterator[tuple[slice, Tensor]]:
    """Filters and their weight (filters, in), a piece after another; none is held here when the next is made."""
    filters, inputs = codes.shape[:2]
    at_once = max(1, PIECE_BYTES // (inputs * table.element_size()))
    for start in range(0, filters, at_once):
        part = slice(start, min(start + at_once, filters))
        yield part, packing.expand_part(codes, table, part).view(-1, inputs)
