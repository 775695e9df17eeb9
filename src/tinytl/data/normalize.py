"""Bytes -> a network's input: ``(x / 255 - mean) / std`` in float32.

A photograph out of Pillow has 8 bits a channel, and as float32 it would say nothing more in four times the memory. So
photographs wait in batches as bytes and become float32 a micro-batch at a time. One formula for one photograph in numpy
(decoding threads know no PyTorch) and for many in PyTorch: float32 minus ``255 * mean``, then divided by ``255 * std``,
each constant rounded once from float64. Subtraction and division are correctly rounded in both, so the bits are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tinytl.errors import InputError

if TYPE_CHECKING:  # photographs can be listed and decoded without it
    import torch

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Normalize:
    """Turns bytes into ``(x / 255 - mean) / std``; ``mean`` and ``std`` per channel, in units of x/255.

    Raises InputError for a value out of range.
    """

    mean: Triple
    std: Triple

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or not all(math.isfinite(value) for value in self.mean):
            raise InputError(f"mean {self.mean!r} is out of range: expected three numbers in units of x/255")
        if len(self.std) != 3 or not all(0 < value < math.inf for value in self.std):
            raise InputError(f"std {self.std!r} is out of range: expected three numbers above 0 in units of x/255")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 (N, 3, H, W), channels last in memory, of ``images``: uint8 (N, 3, H, W), left as they are.

        Made of PyTorch's operators alone, so that it runs on fake tensors and on any device. It allocates the result,
        12 N H W bytes, and beside it 12 W + 12 at a time, both given back: a channel's constant repeated along a row of
        pixels. PyTorch's vector loop runs along the innermost dimension, which would be the three channels alone.

        Raises TypeError for images that are no bytes.
        """
        import torch

        if images.dtype != torch.uint8:
            raise TypeError(f"images of {images.dtype}: expected torch.uint8, which is what is not normalized yet")
        count, channels, height, width = images.shape
        result = images.to(torch.float32, memory_format=torch.channels_last)
        rows = result.permute(0, 2, 3, 1).view(count, height, width * channels)
        rows.sub_(torch.tensor(_scaled(self.mean), device=images.device).expand(width, -1).flatten())
        rows.div_(torch.tensor(_scaled(self.std), device=images.device).expand(width, -1).flatten())
        return result

    def array(self, pixels: ByteArray) -> FloatArray:
        """Return float32 (3, H, W) of one photograph, uint8 (3, H, W); the memory's order stays, no PyTorch."""
        last = pixels.transpose(1, 2, 0).astype(np.float32)  # (H, W, 3)
        last -= _scaled(self.mean)
        last /= _scaled(self.std)
        return last.transpose(2, 0, 1)


def _scaled(values: Triple) -> FloatArray:
    """255 x each, rounded once, from float64; 127 and 128, as TensorFlow's networks have them, stay whole."""
    return (255.0 * np.asarray(values, np.float64)).astype(np.float32)
