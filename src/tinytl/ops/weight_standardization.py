"""Weight standardization: each output channel's filter gets mean 0 and standard deviation 1.

For a filter w of n = in/groups * kh * kw values::

    mu    = sum(w) / n
    sigma = sqrt(sum((w - mu)^2) / (n - 1))            # unbiased
    w_hat = (w - mu) / (sigma + eps)                   # eps outside the root

A frozen weight is standardized once and stored; a trainable one goes through here in every forward pass. With
u = w - mu and g = dL/dw_hat::

    dL/du = g / (sigma + eps) - u * sum(g * u) / ((sigma + eps)^2 * sigma * (n - 1))
    dL/dw = dL/du - mean(dL/du) = dL/du with g - mean(g) for g, since the mean of u is 0

Source: Qiao et al., "Weight Standardization" (arXiv 1903.10520); the unbiased deviation and eps = 1e-5 added
to it (not to the variance) are those of the TinyTL reference, held to its figures by tests/test_golden.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._filters import filter_products


def standardize(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Standardize each output channel of ``weight``; differentiable through stock autograd.

    Args:
        weight: (out, in/groups, kh, kw), or any shape of at least 2 dimensions whose first is the output
            channel.
        eps: added to the standard deviation.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        ValueError: a filter of a single value has no unbiased deviation.
    """
    values = weight[0].numel()
    if values < 2:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)}: standardization needs >= 2 values a filter, got {values}"
        )
    dims = tuple(range(1, weight.dim()))
    centred = weight - weight.mean(dim=dims, keepdim=True)
    # The deviation of the centred weight is that of the weight; the reference takes it in this order too.
    deviation = centred.std(dim=dims, keepdim=True, unbiased=True) + eps
    return centred / deviation if torch.is_grad_enabled() and weight.requires_grad else centred.div_(deviation)


def standardize_gradient_(weight: Tensor, grad: Tensor, eps: float = 1e-5) -> Tensor:
    """The gradient of ``weight`` in the place of ``grad``, that of ``standardize(weight, eps)``.

    Nothing of the weight's size is allocated where both are stored alike. A filter of equal values, whose deviation is
    0, gets what autograd gives: the second term is left out.

    Args:
        weight: (out, ...).
        grad: of its shape; overwritten.
        eps: as for ``standardize``.

    Returns:
        ``grad``.
    """
    dims = tuple(range(1, weight.dim()))
    sigma, mu = torch.std_mean(weight, dim=dims, keepdim=True, unbiased=True)
    spread = sigma + eps
    grad.sub_(grad.mean(dim=dims, keepdim=True))  # so that its product with w is that with u
    inner = filter_products(grad, weight).view_as(sigma)
    along = inner / (spread.square() * sigma * (weight[0].numel() - 1))
    along.masked_fill_(sigma == 0, 0.0)
    return grad.div_(spread).addcmul_(weight, -along).add_(along * mu)
