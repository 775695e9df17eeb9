"""MobileNetV2 (Sandler et al., CVPR 2018) at any width: the inverted residual's own network.

Width 1: 3,504,872 parameters with 1000 classes, 300.77 M multiply-adds at 224 px. A width multiplies every channel
count (made divisible by 8); the head never gets narrower than 1280. Symmetric padding, ReLU6, batch norm eps 1e-5 as
torchvision and timm train it (torch's own default, not the 1e-3 of the networks that come from TensorFlow).

Published names: torchvision's (``features.N.conv...``, ``classifier.1``) and timm's (``conv_stem``,
``blocks.STAGE.BLOCK.conv_pw`` ...).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from tinytl.backbones._base import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from tinytl.backbones._inverted_residual import BlockSpec, InvertedResidualNet
from tinytl.backbones._layouts import Layout, renamed, unit_path
from tinytl.errors import InputError
from tinytl.nn.layers import Norm
from tinytl.nn.lite_residual import make_divisible

# (expand, out channels, repeats, stride of the first block) a stage, before scaling: t, c, n, s of the paper's table 2.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM, HEAD = 32, 1280
EPS = 1e-5

TORCHVISION = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "bilinear", 0.875)
"""For width 1, whose weights torchvision publishes."""
TIMM = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "bicubic", 0.875)
"""For the other widths, whose weights timm publishes (0.5 and 1.4)."""


def blocks(width: float = 1.0) -> tuple[BlockSpec, ...]:
    """The 17 blocks at a width multiplier."""
    specs: list[BlockSpec] = []
    channels = make_divisible(STEM * width)
    for expand, out, repeats, stride in STAGES:
        out = make_divisible(out * width)
        for index in range(repeats):
            specs.append(BlockSpec(channels, out, 3, stride if index == 0 else 1, expand))
            channels = out
    return tuple(specs)


def mobilenet_v2(norm: Norm = "bn", num_classes: int = 1000, width: float = 1.0) -> InvertedResidualNet:
    """MobileNetV2 with random weights, 224 px.

    >>> sum(parameter.numel() for parameter in mobilenet_v2(width=1.4).parameters())
    6108776

    Raises:
        InputError: a width that is not above 0 and at most 10.
    """
    if not 0 < width <= 10:
        raise InputError(f"width {width}: expected a number above 0 and at most 10, 1 is the paper's network")
    head = make_divisible(HEAD * max(1.0, width))
    return InvertedResidualNet(blocks(width), head, num_classes, norm, eps=EPS)


def torchvision_names(keys: Sequence[str], width: float = 1.0) -> Mapping[str, str]:
    """Our name -> torchvision's, for each of our names in ``keys`` (a state dict's keys).

    >>> torchvision_names(["features.block2.body.project.conv.weight"])
    {'features.block2.body.project.conv.weight': 'features.3.conv.2.weight'}
    """
    specs = blocks(width)
    layers = {"classifier": "classifier.1"}
    units = {"features.stem": "features.0", "features.head": f"features.{len(specs) + 1}"}
    for index, spec in enumerate(specs):
        ours, theirs = unit_path(index, spec), f"features.{index + 1}.conv"
        with_act = ["expand", "depthwise"] if spec.expand != 1 else ["depthwise"]
        for number, unit in enumerate(with_act):
            units[f"{ours}.{unit}"] = f"{theirs}.{number}"
        layers[f"{ours}.project.conv"] = f"{theirs}.{len(with_act)}"
        layers[f"{ours}.project.norm"] = f"{theirs}.{len(with_act) + 1}"
    for ours, theirs in units.items():
        layers[f"{ours}.conv"], layers[f"{ours}.norm"] = f"{theirs}.0", f"{theirs}.1"
    return renamed(keys, layers)


def timm_names(keys: Sequence[str], width: float = 1.0) -> Mapping[str, str]:
    """Our name -> timm's, for each of our names in ``keys`` (a state dict's keys).

    >>> timm_names(["features.block2.body.project.conv.weight"])
    {'features.block2.body.project.conv.weight': 'blocks.1.1.conv_pwl.weight'}
    """
    layers = {"classifier": "classifier"}
    layers |= {"features.stem.conv": "conv_stem", "features.stem.norm": "bn1"}
    layers |= {"features.head.conv": "conv_head", "features.head.norm": "bn2"}
    places = [(stage, place) for stage, (_, _, repeats, _) in enumerate(STAGES) for place in range(repeats)]
    for index, (spec, (stage, place)) in enumerate(zip(blocks(width), places, strict=True)):
        units = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
        if spec.expand == 1:
            units = {"depthwise": "conv_dw", "project": "conv_pw"}
        for number, (unit, conv) in enumerate(units.items(), start=1):
            ours, theirs = f"{unit_path(index, spec)}.{unit}", f"blocks.{stage}.{place}"
            layers[f"{ours}.conv"], layers[f"{ours}.norm"] = f"{theirs}.{conv}", f"{theirs}.bn{number}"
    return renamed(keys, layers)


def layouts(width: float = 1.0) -> tuple[Layout, ...]:
    """The published layouts. (Where a shortcut stands depends on the width, and with it our names.)"""
    return (
        Layout("torchvision", functools.partial(torchvision_names, width=width)),
        Layout("timm", functools.partial(timm_names, width=width)),
    )
