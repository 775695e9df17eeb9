"""Batch norm whose statistics stay as they are, in stock PyTorch."""

from __future__ import annotations

from typing import Any

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


class StaysInEvaluation:
    """In the place of `train` of a normalization with a forward of its own: it stays in evaluation mode."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        """Set the modes of what it holds, and its own to evaluation."""
        kind: Any = type(self.module)
        kind.train(self.module, mode)
        self.module.training = False
        return self.module
