"""MobileNetV3-Large: hard-swish, and squeeze and excite inside the inverted residuals.

5,483,032 parameters with 1000 classes, 217 M multiply-adds at 224 px. Module paths::

    features.stem                                  conv, norm, act
    features.block0 ... features.block14           expand, depthwise, excite, project  (or Residual(body=those))
    features.head                                  conv, norm, act
    hidden                                         linear, act: the first layer of the published head
    dropout, classifier

``expand`` is absent where the block does not widen, ``excite`` where the table says so.

Source: Howard et al., "Searching for MobileNetV3" (arXiv 1905.02244), table 1, as torchvision has it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from tinytl.backbones._base import Preprocessing
from tinytl.backbones._layouts import renamed
from tinytl.nn.layers import NORM_EPS, Norm, Residual, SqueezeExcite, conv_norm_act
from tinytl.nn.lite_residual import make_divisible


@dataclass(frozen=True)
class ExcitedBlockSpec:
    """One block: 1x1 to ``middle_channels``, k x k depthwise with the stride, squeeze and excite, 1x1 linear."""

    in_channels: int
    middle_channels: int
    out_channels: int
    kernel: int
    stride: int
    excites: bool
    hard_swish: bool

    @property
    def has_shortcut(self) -> bool:
        """Whether the block's shape allows the identity shortcut."""
        return self.stride == 1 and self.in_channels == self.out_channels


# (kernel, middle channels, out channels, squeeze and excite, hard-swish instead of ReLU, stride) a block
_LARGE = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)

PREPROCESSING = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875)


def _blocks() -> tuple[ExcitedBlockSpec, ...]:
    specs: list[ExcitedBlockSpec] = []
    channels = 16
    for kernel, middle, out, excites, hard_swish, stride in _LARGE:
        specs.append(ExcitedBlockSpec(channels, middle, out, kernel, stride, excites, hard_swish))
        channels = out
    return tuple(specs)


BLOCKS = _blocks()


class MobileNetV3(nn.Module):
    """Stem (3x3, stride 2), blocks, 1x1 head, global mean, hidden layer, dropout 0.2, linear classifier.

    Shapes: (N, 3, H, W) -> (N, num_classes). Random weights as ``torch.nn`` draws them, training mode.

    Args:
        blocks: the blocks in order; the stem's width is the first one's ``in_channels``.
        head_channels: width of the 1x1 head.
        hidden_channels: width of the hidden layer, and of the classifier's input.
        num_classes: of the classifier.
        norm: 'bn', or 'gn' (with weight standardization).
        eps: of every normalization.
        hidden_bias: whether the hidden layer has a bias, which MobileNetV3's own has.
    """

    def __init__(
        self,
        blocks: tuple[ExcitedBlockSpec, ...] = BLOCKS,
        head_channels: int = 960,
        hidden_channels: int = 1280,
        num_classes: int = 1000,
        norm: Norm = "bn",
        eps: float = NORM_EPS,
        hidden_bias: bool = True,
    ) -> None:
        super().__init__()
        stem, last = blocks[0].in_channels, blocks[-1].out_channels
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["stem"] = conv_norm_act(3, stem, 3, stride=2, norm=norm, act=nn.Hardswish, eps=eps)
        for index, spec in enumerate(blocks):
            layers[f"block{index}"] = _block(spec, norm, eps)
        layers["head"] = conv_norm_act(last, head_channels, norm=norm, act=nn.Hardswish, eps=eps)
        self.features = nn.Sequential(layers)
        hidden = nn.Linear(head_channels, hidden_channels, bias=hidden_bias)
        self.hidden = nn.Sequential(OrderedDict(linear=hidden, act=nn.Hardswish()))
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(hidden_channels, num_classes)

    @property
    def block_paths(self) -> tuple[str, ...]:
        """Paths of the inverted-residual blocks, in forward order."""
        return tuple(f"features.{name}" for name, _ in self.features.named_children() if name.startswith("block"))

    def forward(self, input: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        features = self.features(input)  # (N, head_channels, H / 32, W / 32)
        return self.classifier(self.dropout(self.hidden(features.mean((2, 3)))))


def _block(spec: ExcitedBlockSpec, norm: Norm, eps: float) -> nn.Module:
    middle, act = spec.middle_channels, nn.Hardswish if spec.hard_swish else nn.ReLU
    units: OrderedDict[str, nn.Module] = OrderedDict()
    if middle != spec.in_channels:
        units["expand"] = conv_norm_act(spec.in_channels, middle, norm=norm, act=act, eps=eps)
    units["depthwise"] = conv_norm_act(
        middle, middle, spec.kernel, stride=spec.stride, groups=middle, norm=norm, act=act, eps=eps
    )
    if spec.excites:
        units["excite"] = SqueezeExcite(middle, make_divisible(middle // 4), nn.ReLU(), nn.Hardsigmoid())
    units["project"] = conv_norm_act(middle, spec.out_channels, norm=norm, act=False, eps=eps)
    body = nn.Sequential(units)
    return Residual(body) if spec.has_shortcut else body


def mobilenet_v3_large(norm: Norm = "bn", num_classes: int = 1000) -> MobileNetV3:
    """MobileNetV3-Large with random weights."""
    return MobileNetV3(BLOCKS, num_classes=num_classes, norm=norm)


def published_names(state: Iterable[str]) -> Mapping[str, str]:
    """Our name -> torchvision's (``mobilenet_v3_large``), for each of our names in ``state`` (a state dict's keys).

    >>> published_names(["features.block3.excite.fc1.bias", "features.stem.norm.weight"])
    {'features.block3.excite.fc1.bias': 'features.4.block.2.fc1.bias', \
'features.stem.norm.weight': 'features.0.1.weight'}

    Raises:
        KeyError: a name that MobileNetV3-Large does not have.
    """
    layers = {"hidden.linear": "classifier.0", "classifier": "classifier.3"}
    units = {"features.stem": "features.0", "features.head": f"features.{len(BLOCKS) + 1}"}
    for index, (ours, kinds) in enumerate(_block_units()):
        for number, kind in enumerate(kinds):
            theirs = f"features.{index + 1}.block.{number}"
            if kind == "excite":
                layers |= {f"{ours}.excite.{layer}": f"{theirs}.{layer}" for layer in ("fc1", "fc2")}
            else:
                units[f"{ours}.{kind}"] = theirs
    for ours, theirs in units.items():
        layers[f"{ours}.conv"], layers[f"{ours}.norm"] = f"{theirs}.0", f"{theirs}.1"
    return renamed(state, layers)


def timm_names(state: Iterable[str]) -> Mapping[str, str]:
    """Our name -> timm's (``mobilenetv3_large_100``).

    timm's ``conv_head.weight`` is a 1x1 convolution's, (1280, 960, 1, 1), where ours is (1280, 960), and its
    normalizations have eps 1e-5: build the network with ``MobileNetV3(eps=1e-5)``.

    Raises:
        KeyError: a name that MobileNetV3-Large does not have.
    """
    layers = {"features.stem.conv": "conv_stem", "features.stem.norm": "bn1"}
    layers |= {"features.head.conv": "blocks.6.0.conv", "features.head.norm": "blocks.6.0.bn1"}
    layers |= {"hidden.linear": "conv_head", "classifier": "classifier"}
    stage, position = 0, -1
    for spec, (ours, kinds) in zip(BLOCKS, _block_units(), strict=True):
        # a stage of timm's ends where the width changes
        begins = position >= 0 and spec.in_channels != spec.out_channels
        stage, position = (stage + 1, 0) if begins else (stage, position + 1)
        theirs = f"blocks.{stage}.{position}"
        convolutions = ("conv_pw", "conv_dw", "conv_pwl") if "expand" in kinds else ("conv_dw", "conv_pw")
        for number, (kind, conv) in enumerate(zip([k for k in kinds if k != "excite"], convolutions, strict=True)):
            layers[f"{ours}.{kind}.conv"] = f"{theirs}.{conv}"
            layers[f"{ours}.{kind}.norm"] = f"{theirs}.bn{number + 1}"
        layers |= {f"{ours}.excite.fc1": f"{theirs}.se.conv_reduce", f"{ours}.excite.fc2": f"{theirs}.se.conv_expand"}
    return renamed(state, layers)


def _block_units() -> list[tuple[str, list[str]]]:
    """Of every block the path of its units and what they are, in order."""
    found = []
    for index, spec in enumerate(BLOCKS):
        kinds = ["expand"] if spec.middle_channels != spec.in_channels else []
        kinds += ["depthwise", "excite", "project"] if spec.excites else ["depthwise", "project"]
        found.append((f"features.block{index}" + (".body" if spec.has_shortcut else ""), kinds))
    return found
