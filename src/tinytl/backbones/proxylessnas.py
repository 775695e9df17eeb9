"""ProxylessNAS-Mobile, the network of the TinyTL paper, and the published checkpoints' key names.

4,080,512 parameters with 1000 classes, 320.43 M multiply-adds at 224 px. Norm 'bn', or 'gn' (group norm with
weight standardization, as the published TinyTL checkpoint
``proxylessnas_mobile+lite_residual@imagenet@ws+gn``).

Published names number the blocks 0, 1, 2, 5, 6, ..., 21: the search space's stage of 32 channels has four
slots and its last two are empty blocks. A block is ``blocks.N.conv`` with ``inverted_bottleneck``,
``depth_conv``, ``point_linear``; once lite residual modules are in, it is ``blocks.N.conv.main_branch`` and
``blocks.N.conv.lite_residual``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tinytl.backbones._base import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from tinytl.backbones._inverted_residual import BlockSpec, InvertedResidualNet
from tinytl.backbones._layouts import Layout, renamed
from tinytl.nn.layers import Norm
from tinytl.nn.lite_residual import insert_lite_blocks_

# (out channels, stride of the first block, ((expand, kernel), ...)) a stage.
STAGES = (
    (16, 1, ((1, 3),)),
    (32, 2, ((3, 5), (3, 3))),
    (40, 2, ((3, 7), (3, 3), (3, 5), (3, 5))),
    (80, 2, ((6, 7), (3, 5), (3, 5), (3, 5))),
    (96, 1, ((6, 5), (3, 5), (3, 5), (3, 5))),
    (192, 2, ((6, 7), (6, 7), (3, 7), (3, 7))),
    (320, 1, ((6, 7),)),
)

PREPROCESSING = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "bilinear", 0.875)


def _blocks() -> tuple[BlockSpec, ...]:
    specs: list[BlockSpec] = []
    channels = 32
    for out, stride, stage in STAGES:
        for index, (expand, kernel) in enumerate(stage):
            specs.append(BlockSpec(channels, out, kernel, stride if index == 0 else 1, expand))
            channels = out
    return tuple(specs)


BLOCKS = _blocks()
PUBLISHED_INDEX = tuple(index if index < 3 else index + 2 for index in range(len(BLOCKS)))
"""Our block number -> the published one."""


def proxylessnas_mobile(norm: Norm = "bn", num_classes: int = 1000, lite: bool = False) -> InvertedResidualNet:
    """ProxylessNAS-Mobile with random weights; ``lite`` inserts 19 fresh lite residual modules."""
    model = InvertedResidualNet(BLOCKS, num_classes=num_classes, norm=norm)
    if lite:
        insert_lite_blocks_(model, model.block_paths[1:], norm=norm)
    return model


def published_names(state: Iterable[str]) -> Mapping[str, str]:
    """Our name -> the published checkpoint's name, for each of our names in ``state`` (a state dict's keys).

    Works for parameters and buffers, with or without lite residual modules (read off the names). The inverse
    is ``{published: ours for ours, published in published_names(state).items()}``.

    >>> published_names(["features.block3.depthwise.norm.bias", "features.block1.lite.norm2.weight"])
    {'features.block3.depthwise.norm.bias': 'blocks.5.conv.depth_conv.bn.bias', \
'features.block1.lite.norm2.weight': 'blocks.1.conv.lite_residual.final_bn.weight'}

    Raises:
        KeyError: a name that ProxylessNAS-Mobile does not have.
    """
    layers = {"classifier": "classifier.linear"}
    units = {"features.stem": "first_conv", "features.head": "feature_mix_layer"}
    branch = {"conv1": "conv1", "norm1": "bn1", "conv2": "conv2", "norm2": "final_bn"}
    for index, (spec, number) in enumerate(zip(BLOCKS, PUBLISHED_INDEX, strict=True)):
        body = ".body" if spec.has_shortcut else ""
        for unit, theirs in (
            ("expand", "inverted_bottleneck"),
            ("depthwise", "depth_conv"),
            ("project", "point_linear"),
        ):
            units[f"features.block{index}{body}.{unit}"] = f"blocks.{number}.conv.{theirs}"
            units[f"features.block{index}.block{body}.{unit}"] = f"blocks.{number}.conv.main_branch.{theirs}"
        for layer, theirs in branch.items():
            layers[f"features.block{index}.lite.{layer}"] = f"blocks.{number}.conv.lite_residual.{theirs}"
    for ours, theirs in units.items():
        layers[f"{ours}.conv"], layers[f"{ours}.norm"] = f"{theirs}.conv", f"{theirs}.bn"
    return renamed(state, layers)


LAYOUTS = (Layout("the TinyTL reference", published_names, ".lite_residual."),)
