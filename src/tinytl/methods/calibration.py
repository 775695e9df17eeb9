"""Statistics for the batch norms of freshly inserted lite residual modules.

A fresh module beside a batch-norm network would normalize by mean 0 and variance 1, that is: not at all. Its
statistics are therefore measured once, on some training images, and stay frozen like those of the main network. Since
a fresh module's last scale is 0, this changes no output. Group norm needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tinytl.errors import InputError
from tinytl.nn.frozen_norm import FrozenStatsBatchNorm2d
from tinytl.nn.lean import LeanConv2d
from tinytl.ops.chain import chain

from .adaptation import Adaptation


@torch.no_grad()
def calibrate_(model: nn.Module, adaptation: Adaptation, images: Iterable[Tensor]) -> int:
    """Set the statistics of every batch norm that `adapt_` inserted to those of `images`, batches (N, 3, H, W).

    `images` may be anything that can be gone over more than once; an iterator is read into a list first. One pass over
    the images for each normalization along a module (two), since the second sees what the first makes of them. Returns
    the number of normalizations set: 0 where none was inserted, or where they are group norms.

    Raises:
        InputError: there are statistics to set, and no images.
    """
    sites: list[Any] = [model.get_submodule(path.rpartition(".")[0]) for path in adaptation.inserted]
    depths = max((len(_normalized(site)) for site in sites), default=0)
    if not depths:
        return 0
    batches = images if iter(images) is not images else list(images)  # an iterator could be read only once
    modes = [(module, module.training) for module in model.modules()]
    found, seen = 0, False
    try:
        model.eval()
        for depth in range(depths):
            moments = [_Moments(site, depth) for site in sites if depth < len(_normalized(site))]
            handles = [entry.site.register_forward_pre_hook(entry.hook) for entry in moments]
            try:
                for batch in batches:
                    model(batch)
                    seen = True
            finally:
                for handle in handles:
                    handle.remove()
            if not seen:
                raise InputError("no images to calibrate the lite residual modules with: give one batch at least")
            for entry in moments:
                entry.store()
            found += len(moments)
    finally:
        for module, mode in modes:
            module.training = mode
    return found


def _normalized(site: Any) -> list[int]:
    """Positions, along the lite branch, of the layers with the statistics of a batch norm, lean or stock."""
    return [i for i, child in enumerate(site.lite.children()) if _statistics(child) is not None]


def _statistics(layer: nn.Module) -> Any:
    """The module that holds the statistics by which `layer` normalizes, or None."""
    if isinstance(layer, LeanConv2d):
        return layer.norm
    return layer if isinstance(layer, FrozenStatsBatchNorm2d) else None


class _Moments:
    """Mean and variance, over all batches, of what one normalization of a lite branch receives."""

    def __init__(self, site: Any, depth: int) -> None:
        children: list[nn.Module] = list(site.lite.children())
        position = _normalized(site)[depth]
        self.site = site
        self._layer = children[position]
        self._before = children[:position]
        self._count = 0
        self._sum = self._square = torch.zeros((), dtype=torch.float64)

    @property
    def hook(self) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A forward pre-hook of the block that adds its input to the moments."""

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            y = args[0]
            for layer in self._before:
                y = layer(y)
            if isinstance(self._layer, LeanConv2d):
                y = chain(y, [self._layer.without_norm()])
            self._count += y.numel() // y.shape[1]
            self._sum = self._sum + y.sum((0, 2, 3), dtype=torch.float64).cpu()
            self._square = self._square + y.square().sum((0, 2, 3), dtype=torch.float64).cpu()

        return add

    def store(self) -> None:
        """Write the moments into the normalization's statistics."""
        mean = self._sum / self._count
        norm = _statistics(self._layer)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((self._square / self._count - mean.square()).clamp_(min=0.0))
