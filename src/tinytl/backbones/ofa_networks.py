"""Sub-networks of a once-for-all space as plain networks, in the paths that the other backbones have.

The family 'proxyless' is an ``InvertedResidualNet``, 'mbv3' a ``MobileNetV3`` whose hidden layer has no bias. Blocks
are numbered as they stand in the sub-network: ``features.block0`` is the fixed first one.
"""

from __future__ import annotations

from tinytl.backbones._inverted_residual import BlockSpec, InvertedResidualNet
from tinytl.backbones.mobilenet_v3 import ExcitedBlockSpec, MobileNetV3
from tinytl.backbones.once_for_all import OfaArchitecture, OfaSpace, active_blocks, middle_channels
from tinytl.nn.layers import Norm


def sub_network(
    space: OfaSpace, architecture: OfaArchitecture, norm: Norm = "bn", num_classes: int = 1000
) -> InvertedResidualNet | MobileNetV3:
    """The sub-network with random weights: (N, 3, H, W) -> (N, num_classes), training mode.

    ``ofa_layouts.cut_state`` gives the weights that a super-network has for it.

    Raises:
        InputError: no architecture of this space.
    """
    chosen = list(zip(active_blocks(space, architecture), architecture.kernels, architecture.expands, strict=True))
    if space.family == "proxyless":
        specs = [BlockSpec(space.stem, space.first, 3, 1, 1)]
        specs += [
            BlockSpec(block.in_channels, block.out_channels, kernel, block.stride, expand)
            for block, kernel, expand in chosen
        ]
        return InvertedResidualNet(specs, space.head, num_classes, norm, eps=space.eps)
    excited = [ExcitedBlockSpec(space.stem, space.stem, space.first, 3, 1, False, False)]
    for block, kernel, expand in chosen:
        stage, middle = space.stages[block.stage], middle_channels(space, block.number, expand)
        excited.append(
            ExcitedBlockSpec(
                block.in_channels, middle, block.out_channels, kernel, block.stride, stage.excites, stage.hard_swish
            )
        )
    return MobileNetV3(tuple(excited), space.head, space.hidden, num_classes, norm, space.eps, hidden_bias=False)
