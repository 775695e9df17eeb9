"""ResNet, version 1.5: the stride of a bottleneck is on its 3x3 convolution.

ResNet-50 has 25,557,032 parameters with 1000 classes and 4.09 G multiply-adds at 224 px. Module paths::

    features.stem                                  conv, norm, act
    features.pool                                  3x3 max pooling, stride 2
    features.block0 ... features.block15           ShortcutBlock: body (reduce, spatial, expand), shortcut, act
    classifier

A basic block (depths 18 and 34) has a body of ``first`` and ``second``. ``shortcut`` is a 1x1 convolution and its norm
where the block changes the shape, else nothing.

Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), as torchvision has it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from tinytl.backbones._base import Preprocessing
from tinytl.backbones._layouts import renamed
from tinytl.errors import UnknownNameError
from tinytl.nn.layers import Norm, ShortcutBlock, conv_norm_act

EPS = 1e-5
"""eps of every normalization, as published."""

DEPTHS: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}
"""Depth -> blocks a stage, and whether they are bottlenecks."""

PREPROCESSING = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875)

_WIDENING = 4  # of a bottleneck's output over its middle


class ResNet(nn.Module):
    """Stem (7x7, stride 2), max pooling, four stages of blocks, global mean, linear classifier.

    Shapes: (N, 3, H, W) -> (N, num_classes). Random weights as ``torch.nn`` draws them, training mode.

    Args:
        stages: number of blocks a stage.
        bottleneck: 1x1, 3x3, 1x1 widening by 4; else two 3x3 convolutions.
        num_classes: of the classifier.
        norm: 'bn', or 'gn' (with weight standardization).
        width: channels of the stem, and of the first stage's middle.
    """

    def __init__(
        self,
        stages: tuple[int, ...],
        bottleneck: bool = True,
        num_classes: int = 1000,
        norm: Norm = "bn",
        width: int = 64,
    ) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["stem"] = conv_norm_act(3, width, 7, stride=2, norm=norm, act=nn.ReLU, eps=EPS)
        layers["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
        channels, index = width, 0
        for stage, count in enumerate(stages):
            middle = width << stage
            for position in range(count):
                stride = 2 if stage and not position else 1
                layers[f"block{index}"] = _block(channels, middle, stride, bottleneck, norm)
                channels = middle * _WIDENING if bottleneck else middle
                index += 1
        self.features = nn.Sequential(layers)
        self.classifier = nn.Linear(channels, num_classes)

    @property
    def block_paths(self) -> tuple[str, ...]:
        """Paths of the residual blocks, in forward order."""
        return tuple(f"features.{name}" for name, _ in self.features.named_children() if name.startswith("block"))

    def forward(self, input: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        features = self.features(input)  # (N, channels, H / 32, W / 32)
        return self.classifier(features.mean((2, 3)))


def _block(channels: int, middle: int, stride: int, bottleneck: bool, norm: Norm) -> nn.Module:
    out = middle * _WIDENING if bottleneck else middle
    units: OrderedDict[str, nn.Module] = OrderedDict()
    if bottleneck:
        units["reduce"] = conv_norm_act(channels, middle, norm=norm, act=nn.ReLU, eps=EPS)
        units["spatial"] = conv_norm_act(middle, middle, 3, stride=stride, norm=norm, act=nn.ReLU, eps=EPS)
        units["expand"] = conv_norm_act(middle, out, norm=norm, act=False, eps=EPS)
    else:
        units["first"] = conv_norm_act(channels, middle, 3, stride=stride, norm=norm, act=nn.ReLU, eps=EPS)
        units["second"] = conv_norm_act(middle, middle, 3, norm=norm, act=False, eps=EPS)
    shortcut: nn.Module = nn.Identity()
    if stride != 1 or channels != out:
        shortcut = conv_norm_act(channels, out, stride=stride, norm=norm, act=False, eps=EPS)
    return ShortcutBlock(nn.Sequential(units), shortcut, nn.ReLU())


def resnet(depth: int, norm: Norm = "bn", num_classes: int = 1000) -> ResNet:
    """The ResNet of that depth with random weights.

    Raises:
        UnknownNameError: not one of ``DEPTHS``.
    """
    if depth not in DEPTHS:
        raise UnknownNameError("ResNet depth", str(depth), [str(known) for known in DEPTHS])
    stages, bottleneck = DEPTHS[depth]
    return ResNet(stages, bottleneck, num_classes, norm)


def resnet50(norm: Norm = "bn", num_classes: int = 1000) -> ResNet:
    """ResNet-50 with random weights."""
    return resnet(50, norm, num_classes)


def published_names(state: Iterable[str], depth: int = 50) -> Mapping[str, str]:
    """Our name -> torchvision's, which is timm's as well, for each of our names in ``state`` (a state dict's keys).

    >>> published_names(["features.block3.shortcut.norm.bias", "features.block15.body.expand.conv.weight"])
    {'features.block3.shortcut.norm.bias': 'layer2.0.downsample.1.bias', \
'features.block15.body.expand.conv.weight': 'layer4.2.conv3.weight'}

    Raises:
        KeyError: a name that the network does not have.
    """
    stages, bottleneck = DEPTHS[depth]
    layers = {"features.stem.conv": "conv1", "features.stem.norm": "bn1", "classifier": "fc"}
    index = 0
    for stage, count in enumerate(stages):
        for position in range(count):
            ours, theirs = f"features.block{index}", f"layer{stage + 1}.{position}"
            for number, unit in enumerate(("reduce", "spatial", "expand") if bottleneck else ("first", "second")):
                layers[f"{ours}.body.{unit}.conv"] = f"{theirs}.conv{number + 1}"
                layers[f"{ours}.body.{unit}.norm"] = f"{theirs}.bn{number + 1}"
            layers[f"{ours}.shortcut.conv"] = f"{theirs}.downsample.0"
            layers[f"{ours}.shortcut.norm"] = f"{theirs}.downsample.1"
            index += 1
    return renamed(state, layers)
