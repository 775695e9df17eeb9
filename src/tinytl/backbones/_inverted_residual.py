"""One network class for the inverted-residual families (EfficientNet-Lite, ProxylessNAS, MobileNetV2 alike).

Module paths, all of them plain ``nn.Sequential`` runs or ``Residual``::

    features.stem                                  conv, norm, act
    features.block0 ... features.blockN            expand, depthwise, project   (or Residual(body=those))
    features.head                                  conv, norm, act
    dropout, classifier

``expand`` is absent at expand ratio 1; ``project`` is linear. A shortcut stands where stride is 1 and the
channels stay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tinytl.nn.layers import NORM_EPS, Norm, Residual, conv_norm_act


@dataclass(frozen=True)
class BlockSpec:
    """One inverted-residual block: 1x1 to in * expand, k x k depthwise with the stride, 1x1 linear to out."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    expand: int

    @property
    def has_shortcut(self) -> bool:
        """Whether the block's shape allows the identity shortcut."""
        return self.stride == 1 and self.in_channels == self.out_channels


class InvertedResidualNet(nn.Module):
    """Stem (3x3, stride 2), inverted-residual blocks, 1x1 head, global mean, dropout 0.2, linear classifier.

    Shapes: (N, 3, H, W) -> (N, num_classes). Random weights as ``torch.nn`` draws them, training mode.

    Args:
        blocks: the blocks in order; the stem's width is the first one's ``in_channels``.
        head_channels: width of the 1x1 head and of the classifier's input.
        num_classes: of the classifier.
        norm: 'bn', or 'gn' (with weight standardization).
        same: TensorFlow SAME padding (norm 'bn' only).
        eps: of every norm, as the published weights were trained with.
    """

    def __init__(
        self,
        blocks: Sequence[BlockSpec],
        head_channels: int = 1280,
        num_classes: int = 1000,
        norm: Norm = "bn",
        same: bool = False,
        eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        stem, last = blocks[0].in_channels, blocks[-1].out_channels
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["stem"] = conv_norm_act(3, stem, 3, stride=2, norm=norm, same=same, eps=eps)
        for index, spec in enumerate(blocks):
            layers[f"block{index}"] = _block(spec, norm, same, eps)
        layers["head"] = conv_norm_act(last, head_channels, norm=norm, same=same, eps=eps)
        self.features = nn.Sequential(layers)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(head_channels, num_classes)

    @property
    def block_paths(self) -> tuple[str, ...]:
        """Paths of the inverted-residual blocks, in forward order."""
        return tuple(f"features.{name}" for name, _ in self.features.named_children() if name.startswith("block"))

    def forward(self, input: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        features = self.features(input)  # (N, head_channels, H / 32, W / 32)
        return self.classifier(self.dropout(features.mean((2, 3))))


def _block(spec: BlockSpec, norm: Norm, same: bool, eps: float) -> nn.Module:
    middle = spec.in_channels * spec.expand
    units: OrderedDict[str, nn.Module] = OrderedDict()
    if spec.expand != 1:
        units["expand"] = conv_norm_act(spec.in_channels, middle, norm=norm, same=same, eps=eps)
    units["depthwise"] = conv_norm_act(
        middle, middle, spec.kernel, stride=spec.stride, groups=middle, norm=norm, same=same, eps=eps
    )
    units["project"] = conv_norm_act(middle, spec.out_channels, norm=norm, act=False, same=same, eps=eps)
    body = nn.Sequential(units)
    return Residual(body) if spec.has_shortcut else body
