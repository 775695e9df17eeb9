"""Progressive shrinking: in which order a super-network's sub-networks are let into its training.

    largest -> smaller kernels -> fewer blocks -> narrower blocks

Each phase opens more and closes nothing: the sub-networks of the phases before stay among those that are drawn, so that
they are not forgotten. Before narrower blocks come, each block's middle channels are sorted by importance, since a
narrower block has the first of them.

Source: Cai et al., "Once-for-All" (ICLR 2020, arXiv 1908.09791), section 3.3; the phases' order and the depth and width
opened one at a time are those of the publisher's training script.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinytl.backbones.ofa_layouts import squeezed_channels
from tinytl.backbones.once_for_all import OfaArchitecture, OfaSpace, middle_channels

from .elastic import ElasticNet


@dataclass(frozen=True)
class Phase:
    """A part of the training, and the sub-networks that it draws from.

    Attributes:
        name: 'largest', 'kernel', 'depth 2', ...
        kernels, expands: that a block may have.
        depth_choices: of a stage's depths the so many largest.
        epochs, lr, warmup_epochs: of its own cosine (`tinytl._schedule`).
        begin: epochs of the phases before it.
        sorted_within: expansions open before it, where it opens a smaller one: the middle channels are sorted first,
            within the bounds of these; None: they stay.
    """

    name: str
    kernels: tuple[int, ...]
    depth_choices: int
    expands: tuple[int, ...]
    epochs: int
    lr: float
    warmup_epochs: int
    begin: int
    sorted_within: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        """Epochs of the phases up to its end."""
        return self.begin + self.epochs


def phases(
    space: OfaSpace, epochs: int, phase_epochs: int, lr: float, phase_lr: float, warmup_epochs: int = 0
) -> tuple[Phase, ...]:
    """The phases of a space, in order: what it has no choice of gets none.

    Args:
        space: of the super-network.
        epochs, lr, warmup_epochs: of the first phase, the largest network alone.
        phase_epochs, phase_lr: of each other.
    """
    kernels, expands = space.kernels[-1:], space.expands[-1:]
    found = [Phase("largest", kernels, 1, expands, epochs, lr, warmup_epochs, 0)]

    def add(name: str, depth_choices: int, expands: tuple[int, ...], within: tuple[int, ...] | None = None) -> None:
        begin = found[-1].end
        found.append(
            Phase(name, space.kernels, depth_choices, expands, phase_epochs, phase_lr, 0, begin, sorted_within=within)
        )

    if len(space.kernels) > 1:
        add("kernel", 1, expands)
    deepest = max(len(stage.depths) for stage in space.stages)
    for choices in range(2, deepest + 1):
        add(f"depth {choices}", choices, expands)
    for choices in range(2, len(space.expands) + 1):
        add(f"expand {choices}", deepest, space.expands[-choices:], space.expands[1 - choices :])
    return tuple(found)


def everything(space: OfaSpace) -> Phase:
    """All of a space's sub-networks, to draw from."""
    return Phase("all", space.kernels, max(len(stage.depths) for stage in space.stages), space.expands, 0, 0.0, 0, 0)


def sample(space: OfaSpace, phase: Phase, draws: random.Random) -> OfaArchitecture:
    """Draw a sub-network of a phase: every depth, kernel and expansion uniformly and for itself."""

    def choice(values: tuple[int, ...]) -> int:
        return values[int(draws.random() * len(values))]  # of Random's methods the one that is promised to stay

    depths = tuple(choice(space.stages[position].depths[-phase.depth_choices :]) for position in space.elastic_stages)
    blocks = sum(depths) + sum(stage.depths[0] for stage in space.stages if len(stage.depths) == 1)
    kernels = tuple(choice(phase.kernels) for _ in range(blocks))
    return OfaArchitecture(depths, kernels, tuple(choice(phase.expands) for _ in range(blocks)))


def drawn(space: OfaSpace, phase: Phase, count: int, seed: int, step: int) -> tuple[OfaArchitecture, ...]:
    """The sub-networks of a step: equal (seed, step), equal ones, in every process."""
    draws = random.Random(f"sub-networks/{seed}/{step}")
    return tuple(sample(space, phase, draws) for _ in range(count))


@torch.no_grad()
def sort_channels_(net: ElasticNet, opened: tuple[int, ...]) -> None:
    """Sort every block's middle channels by importance, the most important first.

    A channel's importance is the L1 norm of what the last convolution reads of it. Sorting stays within the bounds of
    the expansions in ``opened``, so every sub-network of these computes what it did before (up to the order of sums):
    the narrowest keeps its channels, and so does each wider one beyond those. Squeeze and excite's inner channels are
    sorted likewise.
    """
    space = net.space
    for number in range(1, len(space.blocks) + 1):
        block = net.elastic_block(number)
        bounds = [0, *(middle_channels(space, number, expand) for expand in opened)]
        depthwise, last = block.depth_conv, block.point_linear.conv.conv
        order = _order(last.weight.abs().sum((0, 2, 3)), bounds)  # (middle,)
        _take_(last, 1, order)
        _take_(depthwise.conv.conv, 0, order)
        _take_norm_(depthwise.bn.bn, order)
        _take_norm_(block.inverted_bottleneck.bn.bn, order)
        _take_(block.inverted_bottleneck.conv.conv, 0, order)
        squeeze = depthwise.se
        if squeeze is not None:
            _take_(squeeze.expand, 0, order)
            _take_(squeeze.reduce, 1, order)
            _sort_squeezed_(squeeze.reduce, squeeze.expand, bounds)


def _sort_squeezed_(reduce: nn.Conv2d, expand: nn.Conv2d, bounds: list[int]) -> None:
    """Sort the channels between the two layers of squeeze and excite; ``bounds`` are the middle channels'."""
    order = _order(expand.weight.abs().sum((0, 2, 3)), [0, *(squeezed_channels(bound) for bound in bounds[1:])])
    _take_(expand, 1, order)
    _take_(reduce, 0, order)


def _order(importance: Tensor, bounds: list[int]) -> Tensor:
    """The channels, between two bounds the most important first; equal ones stay in order."""
    parts = []
    for begin, end in itertools.pairwise(bounds):
        parts.append(begin + torch.sort(importance[begin:end], descending=True, stable=True).indices)
    assert bounds[-1] == len(importance)
    return torch.cat(parts)


def _take_(conv: nn.Conv2d, axis: int, order: Tensor) -> None:
    """Put a convolution's filters (axis 0, with their biases) or what it reads (axis 1) into another order."""
    conv.weight.copy_(conv.weight.index_select(axis, order))
    if axis == 0 and conv.bias is not None:
        conv.bias.copy_(conv.bias.index_select(0, order))


def _take_norm_(norm: nn.BatchNorm2d, order: Tensor) -> None:
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.copy_(tensor.index_select(0, order))
