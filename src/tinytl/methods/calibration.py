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

from tinytl.nn.lean import LeanConv2d, LeanLiteBlock
from tinytl.ops.chain import chain

from .adaptation import Adaptation


@torch.no_grad()
def calibrate_(model: nn.Module, adaptation: Adaptation, images: Iterable[Tensor]) -> int:
    """Set the statistics of every batch norm that `adapt_` inserted to those of `images`, batches (N, 3, H, W).

    One pass over the images for each normalization along a module (two), since the second sees what the first makes
    of them. Returns the number of normalizations set: 0 where none was inserted, or where they are group norms.
    """
    batches = list(images)
    sites = [model.get_submodule(path.rpartition(".")[0]) for path in adaptation.inserted]
    modules = [site for site in sites if isinstance(site, LeanLiteBlock)]
    if not batches or not any(_normalized(site) for site in modules):
        return 0
    was_training, found = model.training, 0
    model.eval()
    for depth in range(max(len(_normalized(site)) for site in modules)):
        moments = [_Moments(site, depth) for site in modules if depth < len(_normalized(site))]
        handles = [entry.site.register_forward_pre_hook(entry.hook) for entry in moments]
        try:
            for batch in batches:
                model(batch)
        finally:
            for handle in handles:
                handle.remove()
        for entry in moments:
            entry.store()
        found += len(moments)
    model.train(was_training)
    return found


def _normalized(site: LeanLiteBlock) -> list[int]:
    """Positions, along the lite branch, of the convolutions that compute with a batch norm."""
    children = list(site.lite.children())
    return [i for i, child in enumerate(children) if isinstance(child, LeanConv2d) and child.norm is not None]


class _Moments:
    """Mean and variance, over all batches, of what one normalization of a lite branch receives."""

    def __init__(self, site: LeanLiteBlock, depth: int) -> None:
        children: list[Any] = list(site.lite.children())
        position = _normalized(site)[depth]
        self.site = site
        self.conv: LeanConv2d = children[position]
        self._before = [stage for child in children[:position] for stage in child.stages()]
        self._count = 0
        self._sum = self._square = torch.zeros((), dtype=torch.float64)

    @property
    def hook(self) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A forward pre-hook of the block that adds its input to the moments."""

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            bare = self.conv.without_norm()
            y = chain(args[0], [*self._before, bare]).double()
            self._count += y.numel() // y.shape[1]
            self._sum = self._sum + y.sum((0, 2, 3)).cpu()
            self._square = self._square + y.square().sum((0, 2, 3)).cpu()

        return add

    def store(self) -> None:
        """Write the moments into the normalization's statistics."""
        mean = self._sum / self._count
        norm: Any = self.conv.norm
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((self._square / self._count - mean.square()).clamp_(min=0.0))
