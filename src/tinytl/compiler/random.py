"""The draws of dropout: counted, not streamed, so that any element of any image can be drawn by itself.

With splitmix64 (Steele, Lea and Flood 2014), all modulo 2^64::

    splitmix64(z):  z += 0x9E3779B97F4A7C15
                    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
                    z = (z ^ z >> 27) * 0x94D049BB133111EB
                    z ^ z >> 31

    key    = splitmix64(splitmix64(splitmix64(seed + number * 0x9E3779B97F4A7C15) + step) + image)
    u[i]   = (splitmix64(key + i) >> 11) * 2^-53                     # in [0, 1)
    kept   = u[i] >= p

``seed`` is the run's, ``number`` that of the dropout layer in the network, ``step`` counts from 1, ``image`` is the
number of the image in the batch and ``i`` that of the element in the image, channels innermost. So neither the size of
a micro-batch nor the number of threads changes a draw, and the executor (native/kernels) makes the same ones.

What is kept is divided by 1 - p; p = 1 keeps nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_ALL = 2**64 - 1


def splitmix64(z: int) -> int:
    """Mix one number of 64 bits.

    >>> hex(splitmix64(0)), hex(splitmix64(2**64 - 1))
    ('0xe220a8397b1dcdaf', '0xe4d971771b652c20')
    """
    z = (z + GOLDEN) & _ALL
    z = ((z ^ z >> 30) * _FIRST) & _ALL
    z = ((z ^ z >> 27) * _SECOND) & _ALL
    return z ^ z >> 31


def key(seed: int, number: int, step: int, image: int) -> int:
    """What the draws of one image begin from."""
    return splitmix64(splitmix64(splitmix64(seed + number * GOLDEN) + step) + image)


def kept(seed: int, number: int, step: int, first: int, shape: tuple[int, ...], p: float) -> Tensor:
    """Draw which elements stay.

    Args:
        seed: of the run, any integer (modulo 2^64).
        number: of the dropout layer.
        step: number of the step, from 1.
        first: number, in the batch, of the first of these images.
        shape: (images, ...) with an image's elements in memory order.
        p: probability that an element is dropped.

    Returns:
        bool tensor of that shape.
    """
    images, *rest = shape
    elements = int(np.prod(rest, dtype=np.int64))
    counts = np.arange(elements, dtype=np.uint64)
    rows = [_mixed(counts + np.uint64(key(seed, number, step, first + n))) for n in range(images)]
    uniform = (np.reshape(rows, (images, elements)).astype(np.uint64) >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(uniform >= p).reshape(shape)


def _mixed(z: np.ndarray) -> np.ndarray:
    """`splitmix64` of each; arrays of uint64 wrap around."""
    z = z + np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))
