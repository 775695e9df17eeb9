"""A weight's filters as rows of a matrix, in the order in which they are stored."""

from __future__ import annotations

import torch
from torch import Tensor


def filters(weight: Tensor) -> Tensor:
    """(out, ...) as (out, values of a filter); a copy only where an image's filter is not stored channels innermost."""
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(weight.shape[0], -1)


def filter_products(a: Tensor, b: Tensor) -> Tensor:
    """(out,): the inner product of each filter of `a` with that of `b`, without their product in between."""
    return torch.bmm(filters(a).unsqueeze(1), filters(b).unsqueeze(2)).view(-1)
