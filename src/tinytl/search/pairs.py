"""Pairs of a sub-network and its accuracy on the held-out fifth, measured in the super-network without training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinytl.data import Batch

from .architecture import Genes
from .shared import SharedNet
from .target import Target
from .tuning import CALIBRATION_PHOTOS

AT_ONCE = 32


@dataclass(frozen=True)
class Accuracy:
    """Of a sub-network on the held-out photographs.

    Attributes:
        top1: share that is right.
        loss: mean cross entropy.
    """

    top1: float
    loss: float


class Meter:
    """Measures sub-networks of a super-network; photographs are decoded once for each resolution, and held.

    Args:
        shared: fine-tuned.
        target: whose held-out photographs are looked at.
    """

    def __init__(self, shared: SharedNet, target: Target) -> None:
        self._shared, self._target = shared, target
        self._held: dict[int, Batch] = {}
        self._calibration: dict[int, list[Tensor]] = {}

    def __call__(self, genome: Genes) -> Accuracy:
        """Measure one; statistics that depend on the architecture are measured on training images first."""
        shared = self._shared
        shared.choose(genome)
        resolution = shared.space.resolution(shared.genome)
        if resolution not in self._held:
            self._held[resolution] = self._target.held_images(resolution)
            self._calibration[resolution] = self._target.calibration_images(resolution, CALIBRATION_PHOTOS)
        shared.eval()
        shared.recalibrate_(self._calibration[resolution])
        right, loss, count = 0, 0.0, len(self._held[resolution])
        with torch.inference_mode():
            for images, labels in self._held[resolution].pieces(AT_ONCE):
                logits = shared(images)
                right += int((logits.argmax(1) == labels).sum())
                loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        return Accuracy(right / count, loss / count)
