"""What a backbone is: a network, how its input is made, and where lite residual modules may go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tinytl.nn.layers import Norm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Per channel R, G, B of x / 255 over ImageNet's training images: what most publishers normalize by."""


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes the network's input (1, 3, resolution, resolution).

    For evaluation: cut a centred square of ``crop_fraction`` of the shorter side, resize it to the resolution,
    divide by 255, subtract ``mean`` and divide by ``std``.

    Attributes:
        resolution: pixels a side.
        mean, std: per channel R, G, B, in units of x / 255.
        interpolation: Pillow's name of the resampling filter, lower case ('bicubic', 'bilinear').
        crop_fraction: share of the shorter side that the centre crop keeps.
    """

    resolution: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_fraction: float


@dataclass(frozen=True)
class Backbone:
    """A network ready to be adapted.

    Attributes:
        name: a key of ``BACKBONES``.
        model: the network, on the CPU, float32, in evaluation mode.
        preprocessing: how its input is made.
        norm: 'bn', or 'gn' (group norm with weight standardization). Networks whose batch norm is folded into the
            weights (the int8-published ones) say 'bn': their lite residual modules have it.
        pretrained: whether its weights were read from a file.
        lite_blocks: module paths in ``model`` of the blocks that may get a lite residual module: every block
            but the first, in forward order.
        lite: 'none', 'fresh' (inserted, untrained: the output is as without them) or 'pretrained' (read from
            a file).
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    norm: Norm
    pretrained: bool
    lite_blocks: tuple[str, ...]
    lite: str = "none"
