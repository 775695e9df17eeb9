"""Batch norm whose statistics stay as they are, in stock PyTorch."""

from __future__ import annotations

from torch import nn


class FrozenStatsBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that normalizes by its stored statistics in every mode and never updates them.

    What a careful user gets from calling `.eval()` on every batch norm after each `model.train()`.
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> FrozenStatsBatchNorm2d:
        """Take over the tensors and options of an ordinary batch norm."""
        frozen = cls.__new__(cls)
        frozen.__dict__ = dict(norm.__dict__)
        return frozen.train()

    def train(self, mode: bool = True) -> FrozenStatsBatchNorm2d:
        """Stay in evaluation mode whatever is asked."""
        super().train(False)
        return self
