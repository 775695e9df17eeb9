"""Batch-norm statistics measured anew on some images, for the sub-network that is run.

A super-network's running statistics are those of whichever sub-networks came last, and belong to none. So they are
measured before a sub-network is judged, as the once-for-all paper does: one pass, in which every batch norm normalizes
by its own batch, and remembers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tinytl.engine.evaluation import module_modes, restore_modes
from tinytl.errors import InputError

from .elastic_layers import ElasticNorm


@torch.no_grad()
def recalibrate_(model: nn.Module, images: Iterable[Tensor]) -> int:
    """Set the statistics of every batch norm that runs to mean and variance of its inputs over all of ``images``.

    Every value counts the same, whatever the batch it came in; the variance is the population's. Of an `ElasticNet` the
    channels of the sub-network that is chosen are set, and no others. Modes and parameters are left as they were.

    Args:
        model: any network; what else it has than batch norms runs in evaluation mode.
        images: batches (N, 3, H, W); a batch normalizes by itself on the way, so larger ones tell more.

    Returns:
        How many batch norms were set; 0 where the model has none.

    Raises:
        InputError: batch norms and no images, or a batch of a single value a channel.
    """
    sites: dict[nn.Module, nn.BatchNorm2d] = {m: m.bn for m in model.modules() if isinstance(m, ElasticNorm)}
    held = set(sites.values())
    sites |= {m: m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m not in held}
    if not sites:
        return 0
    modes, tracked = module_modes(model), {norm: norm.track_running_stats for norm in sites.values()}
    moments = {site: _Moments() for site in sites}
    handles = [site.register_forward_pre_hook(entry.add) for site, entry in moments.items()]
    seen = False
    try:
        model.eval()
        for norm in tracked:  # by its batch, and without touching what it has stored
            norm.training, norm.track_running_stats = True, False
        for batch in images:
            model(batch)
            seen = True
    finally:
        for handle in handles:
            handle.remove()
        for norm, before in tracked.items():
            norm.track_running_stats = before
        restore_modes(modes)
    if not seen:
        raise InputError("no images to measure the batch norms' statistics on: give one batch at least")
    found = [(sites[site], entry) for site, entry in moments.items() if entry.count]
    for norm, entry in found:
        entry.store(norm)
    return len(found)


@dataclass
class _Moments:
    """Mean and sum of squared distances from it, of each channel, over the batches so far (Chan et al. 1979)."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add a batch (N, C, H, W), as a forward pre-hook."""
        x: Tensor = args[0]
        n = x.numel() // x.shape[1]
        if n < 2:
            raise InputError(f"a batch of shape {tuple(x.shape)} has one value a channel, which has no variance: "
                             "give larger batches or images")  # fmt: skip
        mean = x.mean((0, 2, 3), dtype=torch.float64)  # (C,)
        squares = (x - mean.to(x.dtype)[:, None, None]).square().sum((0, 2, 3), dtype=torch.float64)
        # the distances were from the rounded mean
        squares -= n * (mean - mean.to(x.dtype).double()).square()
        total, apart = self.count + n, mean - self.mean
        self.squares = self.squares + squares + apart.square() * (self.count * n / total)
        self.mean = self.mean + apart * (n / total)
        self.count = total

    def store(self, norm: nn.BatchNorm2d) -> None:
        """Write the statistics into the first channels of a batch norm."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean[: len(self.mean)].copy_(self.mean)
        norm.running_var[: len(self.mean)].copy_((self.squares / self.count).clamp_(min=0.0))
