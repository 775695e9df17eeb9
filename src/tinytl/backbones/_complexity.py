"""Parameters and multiply-adds of a network, counted by a run on the meta device (no arithmetic)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinytl.errors import UnsupportedLayerError


@dataclass(frozen=True)
class Complexity:
    """Totals of a network: ``parameters`` (buffers left out) and ``multiply_adds`` for one image."""

    parameters: int
    multiply_adds: int


def complexity(model: nn.Module, resolution: int) -> Complexity:
    """Count the parameters, and the multiply-adds of one (1, 3, resolution, resolution) image.

    A convolution counts out elements x in/groups x kernel area, a linear layer in x out; biases, norms,
    activations and shortcuts count nothing, as in the published totals. ``model`` is left as it is.

    Raises:
        UnsupportedLayerError: a layer with parameters of its own that is none of these (never counted as
            zero).
    """
    counted = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        if isinstance(module, nn.Conv2d):
            counted += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            counted += output.numel() * module.in_features

    meta = copy.deepcopy(model).to("meta").eval()
    for path, module in meta.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
        elif next(module.parameters(recurse=False), None) is not None and not isinstance(
            module, nn.BatchNorm2d | nn.GroupNorm
        ):
            raise UnsupportedLayerError(f"{path}: cannot count the multiply-adds of {type(module).__name__}")
    with torch.no_grad():
        dtype = next(meta.parameters()).dtype
        meta(torch.empty(1, 3, resolution, resolution, device="meta", dtype=dtype))
    return Complexity(sum(parameter.numel() for parameter in model.parameters()), counted)
