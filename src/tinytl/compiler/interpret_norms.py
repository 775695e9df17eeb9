"""Group normalization and its gradient.

With xh = (x - mean) rstd over the pixels and channels of a group, gh = gamma dL/dy::

    y = gamma xh + beta        dL/dx = rstd (gh - mean(gh) - xh mean(gh xh))
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interpret_call import Call, OpFunction, over_channels


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(n, H, W, C) -> (n, H W, groups, C / groups)."""
    return x.reshape(len(x), -1, groups, x.shape[-1] // groups)


def _group_norm(call: Call) -> dict[str, Tensor]:
    x = call["x"]
    parts = _grouped(x, call.number("groups"))
    mean = parts.mean((1, 3), keepdim=True)
    variance = (parts - mean).square().mean((1, 3), keepdim=True)
    rstd = (variance + call.real("eps")).rsqrt()
    z = ((parts - mean) * rstd).reshape(x.shape)
    gamma, beta = call.get("gamma"), call.get("beta")
    if gamma is not None:
        z = z * gamma
    if beta is not None:
        z = z + beta
    return call.act(z, {"stats": torch.stack([mean[:, 0, :, 0], rstd[:, 0, :, 0]], dim=-1)})


def _group_norm_grad(call: Call) -> dict[str, Tensor]:
    grad, gamma, groups = call["grad"], call.get("gamma"), call.number("groups")
    mean, rstd = (call["stats"][:, None, :, None, k] for k in (0, 1))  # (n, 1, groups, 1)
    unit = (_grouped(call["x"], groups) - mean) * rstd
    scaled = _grouped(grad if gamma is None else grad * gamma, groups)
    means = scaled.mean((1, 3), keepdim=True), (scaled * unit).mean((1, 3), keepdim=True)
    y = rstd * (scaled - means[0] - unit * means[1])
    return {
        "y": y.reshape(grad.shape),
        "gamma_grad": over_channels(grad * unit.reshape(grad.shape)),
        "beta_grad": over_channels(grad),
    }


NORM_OPS: dict[str, OpFunction] = {"group_norm": _group_norm, "group_norm_grad": _group_norm_grad}
