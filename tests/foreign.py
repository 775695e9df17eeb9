"""What every network from elsewhere is held against: stock PyTorch training the same parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tinytl.methods import METHODS, Adaptation, adapt_
from tinytl.nn.kept import kept

from .observed import observe_kept
from .test_adapt import assert_same_gradients, backward, enliven_, images


def settle_(model: nn.Module) -> nn.Module:
    """Statistics and affine values that are not the identity, no randomness, float64, evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.1)
    normed = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) and m.weight is not None]
    for module in normed:
        enliven_(module)
    return model.double().eval()


def observed_bytes(model: nn.Module, side: int, batch: int) -> int:
    """What autograd is seen to keep in a forward pass in training mode."""
    x = images(batch, side, next(model.parameters()).dtype)
    return observe_kept(lambda: model.train()(x), [*model.parameters(), *model.buffers()])[0]


def assert_adapts(base: nn.Module, name: str, side: int, batch: int = 2, **options: Any) -> tuple[Adaptation, float]:
    """Lean equals stock: output, trained set, gradients; kept by rule equals kept as observed.

    Returns the adaptation, and the share of stock's bytes that the lean form keeps.
    """
    x = images(batch, side, torch.float64)
    with torch.no_grad():
        before = base(x)
    lean, stock = copy.deepcopy(base), copy.deepcopy(base)
    adaptation = adapt_(lean, METHODS[name], resolution=side, **options)
    adapt_(stock, METHODS[name], resolution=side, lean=False, **options)
    scale = before.abs().max().clamp(min=1e-6)
    torch.testing.assert_close(lean(x) / scale, before / scale, rtol=1e-9, atol=1e-9)
    trained = {n for n, p in stock.named_parameters() if p.requires_grad}
    assert {adaptation.origins.get(n, n) for n in adaptation.trained} == trained
    for model in (lean, stock):  # a fresh lite module's last scale is 0, which hides what stands before it
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            if ".lite." in path and ("norm2" in path or "conv2.norm" in path) and path.endswith(".weight"):
                tensor.data.copy_(torch.linspace(0.5, 1.5, tensor.numel()))
    for training in (False, True):
        lean.train(training)
        stock.train(training)
        torch.testing.assert_close(lean(x) / scale, stock(x) / scale, rtol=1e-9, atol=1e-9)
        assert_same_gradients(backward(lean, x), backward(stock, x), adaptation)
    seen = observed_bytes(lean, side, batch)
    assert kept(lean, tuple(x.shape)).total_bytes == seen
    assert adaptation.kept_bytes_per_image == kept(lean, (1, *x.shape[1:])).total_bytes
    return adaptation, seen / observed_bytes(stock, side, batch)
