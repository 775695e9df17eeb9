"""Three ImageNet networks for microcontrollers, published with int8 weights (Lin et al., NeurIPS 2020 and 2022).

=============  ==========  ============================  =========================================================
name           parameters  multiply-adds at 128 px       top-1 as published, in int8
=============  ==========  ============================  =========================================================
proxyless_w03     423,232  18.72 M                       48.3 %; ProxylessNAS at width 0.3
mcunet_5fps       630,224  22.61 M                       54.1 %; found by TinyNAS for five images a second
mbv2_w035         357,448  16.76 M                       45.7 %; MobileNetV2 at width 0.35
=============  ==========  ============================  =========================================================

Stem (3x3, stride 2), inverted-residual blocks, global mean, linear classifier; no 1x1 head. Batch norm is folded in:
every convolution has a bias, which is what TinyTL-B trains, and there is no norm. ReLU6 stands after the stem, the
expansion and the depthwise convolution; padding is symmetric. Here the network computes in floating point with the
published weights (``mcu_weights.py``); the published accuracy is that of 8-bit arithmetic.

Paths: ``features.stem``, ``features.blockN`` (``expand``, ``depthwise``, ``project``), ``classifier``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from tinytl.backbones._base import Preprocessing
from tinytl.backbones._inverted_residual import BlockSpec
from tinytl.backbones.weights import WeightsSource
from tinytl.errors import InputError
from tinytl.nn.layers import Norm, Residual

B = BlockSpec  # (in channels, out channels, kernel, stride, expand)
# fmt: off
PROXYLESS_W03 = (
    B(16, 8, 3, 1, 1),
    B(8, 16, 5, 2, 3), B(16, 16, 3, 1, 3),
    B(16, 16, 7, 2, 3), B(16, 16, 3, 1, 3), B(16, 16, 5, 1, 3), B(16, 16, 5, 1, 3),
    B(16, 24, 7, 2, 6), B(24, 24, 5, 1, 3), B(24, 24, 5, 1, 3), B(24, 24, 5, 1, 3),
    B(24, 32, 5, 1, 6), B(32, 32, 5, 1, 3), B(32, 32, 5, 1, 3), B(32, 32, 5, 1, 3),
    B(32, 64, 7, 2, 6), B(64, 64, 7, 1, 6), B(64, 64, 7, 1, 3), B(64, 64, 7, 1, 3),
    B(64, 96, 7, 1, 6),
)
MCUNET_5FPS = (
    B(16, 8, 3, 1, 1),
    B(8, 16, 3, 2, 4), B(16, 16, 3, 1, 3),
    B(16, 24, 7, 2, 3), B(24, 24, 3, 1, 5),
    B(24, 40, 3, 2, 5), B(40, 40, 7, 1, 4),
    B(40, 48, 5, 1, 4), B(48, 48, 3, 1, 3), B(48, 48, 3, 1, 4),
    B(48, 96, 7, 2, 5), B(96, 96, 5, 1, 4), B(96, 96, 5, 1, 4),
    B(96, 160, 3, 1, 6),
)
MBV2_W035 = (
    B(16, 8, 3, 1, 1),
    B(8, 8, 3, 2, 6), B(8, 8, 3, 1, 6),
    B(8, 16, 3, 2, 6), B(16, 16, 3, 1, 6), B(16, 16, 3, 1, 6),
    B(16, 24, 3, 2, 6), B(24, 24, 3, 1, 6), B(24, 24, 3, 1, 6), B(24, 24, 3, 1, 6),
    B(24, 32, 3, 1, 6), B(32, 32, 3, 1, 6), B(32, 32, 3, 1, 6),
    B(32, 56, 3, 2, 6), B(56, 56, 3, 1, 6), B(56, 56, 3, 1, 6),
    B(56, 112, 3, 1, 6),
)
# fmt: on
SPECS = {"proxyless_w03": PROXYLESS_W03, "mcunet_5fps": MCUNET_5FPS, "mbv2_w035": MBV2_W035}

PREPROCESSING = Preprocessing(128, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.875)
"""(x / 255 - 0.5) / 0.5."""

PUBLISHER = "https://raw.githubusercontent.com/mit-han-lab/tiny-training/main/algorithm/assets/mcu_models"
MIRROR = "https://github.com/mit-han-lab/tiny-training/raw/main/algorithm/assets/mcu_models"


def _source(file: str, sha256: str) -> WeightsSource:
    return WeightsSource(urls=(f"{PUBLISHER}/{file}", f"{MIRROR}/{file}"), file=file, sha256=sha256)


SOURCES = {
    "proxyless_w03": _source("proxyless-w0.3.pkl", "0da06d029506a36e5a5d0822493cdae11f37ba78662f9aca25ba5b3c958cf8e1"),
    "mcunet_5fps": _source("mcunet-5fps.pkl", "4de2e06ed39041fc3609de806461a9e1d1f82f186927474bd9e9b0de756a0f00"),
    "mbv2_w035": _source("mbv2-w0.35.pkl", "310d2871c50a89af9f11928e28418729984c2e402cf68560a19b6cbb75854163"),
}


class FoldedNet(nn.Module):
    """A stem, inverted-residual blocks without norms, global mean, linear classifier.

    Shapes: (N, 3, H, W) -> (N, num_classes). Random weights as ``torch.nn`` draws them, training mode.

    Args:
        blocks: the blocks in order; the stem's width is the first one's ``in_channels``.
        num_classes: of the classifier.
    """

    def __init__(self, blocks: Sequence[BlockSpec], num_classes: int = 1000) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_conv(3, blocks[0].in_channels, 3, 2))
        for index, spec in enumerate(blocks):
            layers[f"block{index}"] = _block(spec)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Linear(blocks[-1].out_channels, num_classes)

    @property
    def block_paths(self) -> tuple[str, ...]:
        """Paths of the inverted-residual blocks, in forward order."""
        return tuple(f"features.{name}" for name, _ in self.features.named_children() if name.startswith("block"))

    def forward(self, input: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        return self.classifier(self.features(input).mean((2, 3)))


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Module:
    padding = (kernel - 1) // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, groups=groups)
    return nn.Sequential(OrderedDict(conv=conv, act=nn.ReLU6()) if act else OrderedDict(conv=conv))


def _block(spec: BlockSpec) -> nn.Module:
    middle = spec.in_channels * spec.expand
    units: OrderedDict[str, nn.Module] = OrderedDict()
    if spec.expand != 1:
        units["expand"] = _conv(spec.in_channels, middle)
    units["depthwise"] = _conv(middle, middle, spec.kernel, spec.stride, groups=middle)
    units["project"] = _conv(middle, spec.out_channels, act=False)
    body = nn.Sequential(units)
    return Residual(body) if spec.has_shortcut else body


def _network(name: str, norm: Norm, num_classes: int) -> FoldedNet:
    if norm != "bn":
        raise InputError(f"{name}: its norms are folded into its weights, norm {norm!r} has none to replace: take 'bn'")
    return FoldedNet(SPECS[name], num_classes)


def proxyless_w03(norm: Norm = "bn", num_classes: int = 1000) -> FoldedNet:
    """ProxylessNAS at width 0.3, 128 px, random weights. ``norm`` can only be 'bn' (folded; see above)."""
    return _network("proxyless_w03", norm, num_classes)


def mcunet_5fps(norm: Norm = "bn", num_classes: int = 1000) -> FoldedNet:
    """MCUNet of five images a second, 128 px, random weights. ``norm`` can only be 'bn' (folded; see above)."""
    return _network("mcunet_5fps", norm, num_classes)


def mbv2_w035(norm: Norm = "bn", num_classes: int = 1000) -> FoldedNet:
    """MobileNetV2 at width 0.35 without its head, 128 px, random weights. ``norm`` can only be 'bn'."""
    return _network("mbv2_w035", norm, num_classes)
