"""Once-for-all spaces: one super-network whose sub-networks of any depth, kernels and widths share its weights.

A space is a stem (3x3, stride 2), a fixed first block, stages of inverted-residual blocks, and a head. A sub-network
keeps the first ``depth`` blocks of each stage; each of its blocks has a depthwise kernel and an expansion of its own::

    middle    the first make_divisible(in * expand) of the widest middle channels
    kernel    the largest kernel's centre, times a learned matrix a step down (7 to 5, 5 to 3)

As text, ``dDDDDD-kKKK...-eEEE...``: a digit for the depth of each stage that has a choice of it, then one for the
kernel and one for the expansion of each block that is there, in forward order. The first block has no digit.

Three spaces are published, with their ImageNet weights, under the names that ``SPACES`` has; ``ofa_tiny_...`` is one of
this package's, for small images and small super-networks to be trained here.

Source: Cai et al., "Once-for-All: Train One Network and Specialize it for Efficient Deployment" (ICLR 2020, arXiv
1908.09791); widths, strides, activations and eps as the publisher's repository (mit-han-lab/once-for-all) has them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from tinytl.backbones._base import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from tinytl.errors import InputError, UnknownNameError
from tinytl.nn.lite_residual import make_divisible

Family = Literal["proxyless", "mbv3"]
"""'proxyless': ReLU6 throughout, and a 1x1 convolution before the mean. 'mbv3': the stages' own activations, hard-swish
in stem and head, squeeze and excite, and a hidden linear layer (no bias) behind the mean."""

_MATRIX = re.compile(r"(\d)to(\d)_matrix", re.ASCII)


@dataclass(frozen=True)
class OfaStage:
    """Blocks of one width.

    Attributes:
        width: output channels of each, a multiple of 8.
        stride: of the first.
        depths: how many of them a sub-network may keep, ascending; one number: no choice.
        excites: squeeze and excite behind the depthwise convolution (family 'mbv3').
        hard_swish: instead of ReLU (family 'mbv3').
    """

    width: int
    stride: int
    depths: tuple[int, ...] = (2, 3, 4)
    excites: bool = False
    hard_swish: bool = False


@dataclass(frozen=True)
class OfaSpace:
    """A space of networks. Every width is a multiple of 8; kernels and expansions are the same for all blocks.

    Attributes:
        name: of the space.
        family: which kind of network (see ``Family``).
        stem: channels of the first convolution.
        first: output channels of the fixed first block (3x3, stride 1, no expansion).
        stages: the elastic stages.
        head: channels of the 1x1 convolution before the mean.
        hidden: width of the linear layer behind the mean; 0: none (family 'proxyless').
        eps: of every batch norm.
        preprocessing: how the networks' input is made.
        kernels, expands: to choose from, ascending.

    Raises:
        InputError: a description that names no such space.
    """

    name: str
    family: Family
    stem: int
    first: int
    stages: tuple[OfaStage, ...]
    head: int
    hidden: int
    eps: float
    preprocessing: Preprocessing
    kernels: tuple[int, ...] = (3, 5, 7)
    expands: tuple[int, ...] = (3, 4, 6)

    def __post_init__(self) -> None:
        widths = (self.stem, self.first, self.head, self.hidden, *(stage.width for stage in self.stages))
        # A digit each in the text, and an expansion of 1 would leave out a layer.
        choices = {"kernels": (self.kernels, range(1, 10, 2)), "expands": (self.expands, range(2, 10))}
        choices |= {f"depths of stage {i}": (stage.depths, range(1, 10)) for i, stage in enumerate(self.stages)}
        for what, (values, allowed) in choices.items():
            if not values or list(values) != sorted(set(values)) or not set(values) <= set(allowed):
                raise InputError(f"{self.name}: {what} are {values}: expected some of {list(allowed)}, ascending")
        if any(width % 8 for width in widths) or min(widths[:3]) < 8 or not self.stages:
            raise InputError(f"{self.name}: widths {widths}: expected stages, and every width a multiple of 8")
        excited = any(stage.excites or stage.hard_swish for stage in self.stages)
        if (self.family == "mbv3") != bool(self.hidden) or (excited and self.family != "mbv3"):
            raise InputError(f"{self.name}: a hidden layer, squeeze and excite, hard-swish belong to 'mbv3' alone")

    @cached_property
    def elastic_stages(self) -> tuple[int, ...]:
        """Positions of the stages that have a choice of depth."""
        return tuple(i for i, stage in enumerate(self.stages) if len(stage.depths) > 1)

    @cached_property
    def blocks(self) -> tuple[OfaBlock, ...]:
        """Every block of the super-network but the first (its number 0), in forward order."""
        found: list[OfaBlock] = []
        channels = self.first
        for position, stage in enumerate(self.stages):
            for place in range(max(stage.depths)):
                stride = 1 if place else stage.stride
                found.append(OfaBlock(len(found) + 1, position, place, channels, stage.width, stride))
                channels = stage.width
        return tuple(found)

    @property
    def first_has_shortcut(self) -> bool:
        """Whether the fixed first block's shape allows the identity shortcut."""
        return self.stem == self.first


@dataclass(frozen=True)
class OfaBlock:
    """An elastic block: its number in the super-network, its stage, its place there, and its ends."""

    number: int
    stage: int
    place: int
    in_channels: int
    out_channels: int
    stride: int

    @property
    def has_shortcut(self) -> bool:
        """Whether the block's shape allows the identity shortcut."""
        return self.stride == 1 and self.in_channels == self.out_channels


@dataclass(frozen=True)
class OfaArchitecture:
    """A sub-network.

    Attributes:
        depths: of each stage that has a choice of depth.
        kernels, expands: of each block that is there, in forward order, the fixed first block left out.
    """

    depths: tuple[int, ...]
    kernels: tuple[int, ...]
    expands: tuple[int, ...]


_WIDE = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "bilinear", 0.875)
_SMALL = Preprocessing(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.875)


def _mbv3(name: str, width: float) -> OfaSpace:
    stem, first, *widths, head, hidden = (
        make_divisible(base * width) for base in (16, 16, 24, 40, 80, 112, 160, 960, 1280)
    )
    strides, excites, swishes = (2, 2, 2, 1, 2), (0, 1, 0, 1, 1), (0, 0, 1, 1, 1)
    stages = tuple(
        OfaStage(out, stride, excites=bool(excite), hard_swish=bool(swish))
        for out, stride, excite, swish in zip(widths, strides, excites, swishes, strict=True)
    )
    return OfaSpace(name, "mbv3", stem, first, stages, head, hidden, 1e-5, _WIDE)


# fmt: off
SPACES: dict[str, OfaSpace] = {
    space.name: space
    for space in (
        OfaSpace(  # widths of ProxylessNAS times 1.3, made divisible by 8
            "ofa_proxyless_d234_e346_k357_w1.3", "proxyless", 40, 24,
            (OfaStage(32, 2), OfaStage(56, 2), OfaStage(104, 2), OfaStage(128, 1), OfaStage(248, 2),
             OfaStage(416, 1, (1,))),
            1664, 0, 1e-3, _WIDE,
        ),
        _mbv3("ofa_mbv3_d234_e346_k357_w1.0", 1.0),
        _mbv3("ofa_mbv3_d234_e346_k357_w1.2", 1.2),
        OfaSpace(
            "ofa_tiny_d234_e346_k357", "proxyless", 16, 8,
            (OfaStage(16, 2), OfaStage(24, 2), OfaStage(32, 2), OfaStage(48, 1), OfaStage(80, 1)),
            256, 0, 1e-3, _SMALL,
        ),
    )
}
# fmt: on
"""Every space by name: the published three, and a small one."""


def space_of(name: str) -> OfaSpace:
    """The space of a backbone's name, ``SPACE`` or ``SPACE@ARCHITECTURE``.

    Raises:
        UnknownNameError: no such space.
    """
    base = name.partition("@")[0]
    if base not in SPACES:
        raise UnknownNameError("once-for-all space", base, SPACES)
    return SPACES[base]


def largest(space: OfaSpace) -> OfaArchitecture:
    """Every block, with the largest kernel and expansion."""
    return _uniform(space, -1)


def smallest(space: OfaSpace) -> OfaArchitecture:
    """The fewest blocks, with the smallest kernel and expansion."""
    return _uniform(space, 0)


def _uniform(space: OfaSpace, which: int) -> OfaArchitecture:
    depths = tuple(space.stages[position].depths[which] for position in space.elastic_stages)
    count = sum(stage.depths[which] for stage in space.stages)
    return OfaArchitecture(depths, (space.kernels[which],) * count, (space.expands[which],) * count)


def active_blocks(space: OfaSpace, architecture: OfaArchitecture) -> tuple[OfaBlock, ...]:
    """The blocks of the super-network that the sub-network has, the fixed first one left out, in forward order.

    ``architecture.kernels`` and ``.expands`` go with them one by one.

    Raises:
        InputError: ``architecture`` is none of ``space``: how many depths, kernels or expansions there are, or one that
            there is no choice of.
    """
    elastic = space.elastic_stages
    if len(architecture.depths) != len(elastic):
        raise InputError(
            f"{space.name}: {len(architecture.depths)} depths: expected {len(elastic)}, one a stage with a choice"
        )
    depths = [max(stage.depths) for stage in space.stages]
    for position, depth in zip(elastic, architecture.depths, strict=True):
        _need(space, f"depth of stage {position}", depth, space.stages[position].depths)
        depths[position] = depth
    blocks = tuple(block for block in space.blocks if block.place < depths[block.stage])
    for what, values, known in (
        ("kernel", architecture.kernels, space.kernels),
        ("expansion", architecture.expands, space.expands),
    ):
        if len(values) != len(blocks):
            raise InputError(f"{space.name}: {len(values)} {what}s: expected {len(blocks)}, one a block that is there")
        for value in values:
            _need(space, what, value, known)
    return blocks


def _need(space: OfaSpace, what: str, value: int, known: tuple[int, ...]) -> None:
    if value not in known:
        raise InputError(f"{space.name}: {what} {value}: expected one of {', '.join(map(str, known))}")


def architecture_text(space: OfaSpace, architecture: OfaArchitecture) -> str:
    """The sub-network as text; equal networks of a space have equal texts.

    >>> tiny = SPACES["ofa_tiny_d234_e346_k357"]
    >>> architecture_text(tiny, smallest(tiny))
    'd22222-k3333333333-e3333333333'

    Raises:
        InputError: as ``active_blocks``.
    """
    active_blocks(space, architecture)
    parts = ("d", architecture.depths), ("k", architecture.kernels), ("e", architecture.expands)
    return "-".join(letter + "".join(map(str, values)) for letter, values in parts)


def parse_architecture(space: OfaSpace, text: str) -> OfaArchitecture:
    """What ``architecture_text`` writes.

    Raises:
        InputError: not such a text, or none of this space.
    """
    found = re.fullmatch(r"d(\d*)-k(\d+)-e(\d+)", text, re.ASCII)
    if not found:
        example = architecture_text(space, smallest(space))
        raise InputError(f"{space.name}: cannot read the architecture {text!r}: expected one like {example!r}")
    depths, kernels, expands = (tuple(map(int, digits)) for digits in found.groups())
    architecture = OfaArchitecture(depths, kernels, expands)
    active_blocks(space, architecture)
    return architecture


def middle_channels(space: OfaSpace, block: int, expand: int) -> int:
    """How many middle channels, from the first on, an elastic block has at an expansion.

    Args:
        space: of the super-network.
        block: its number in the super-network, from 1 on (0 is the fixed first block).
        expand: one of ``space.expands``.
    """
    return make_divisible(space.blocks[block - 1].in_channels * expand)


def matrix_names(kernels: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    """(name, size of the smaller kernel) of each learned matrix, from the largest kernel down.

    >>> matrix_names((3, 5, 7))
    (('7to5_matrix', 5), ('5to3_matrix', 3))
    """
    return tuple((f"{large}to{small}_matrix", small) for small, large in reversed(list(itertools.pairwise(kernels))))


def elastic_kernel(weight: Tensor, matrices: Mapping[str, Tensor], kernel: int) -> Tensor:
    """A smaller depthwise kernel out of the largest one.

    A step from K to the next smaller k: crop the k x k centre, flatten it to (C, k * k), multiply by the matrix
    (``F.linear``, so that row i makes pixel i), reshape to (C, 1, k, k). Channels are to be cut BEFORE: whoever repeats
    this with the same channels and order has the same bits.

    Args:
        weight: (C, 1, K, K), the channels that are there, at the largest kernel.
        matrices: ``7to5_matrix`` (25, 25), ``5to3_matrix`` (9, 9), ...: one a step of the space's kernels.
        kernel: which is wanted.

    Returns:
        (C, 1, kernel, kernel), contiguous where it is not ``weight`` itself; differentiable.

    Raises:
        ValueError: the matrices lead to no such kernel.
    """
    steps = {int(found[1]): int(found[2]) for name in matrices if (found := _MATRIX.fullmatch(name))}
    while (size := weight.shape[-1]) > kernel and size in steps:
        small = steps[size]
        start = size // 2 - small // 2
        centre = weight[:, :, start : start + small, start : start + small].reshape(-1, small * small)
        weight = F.linear(centre, matrices[f"{size}to{small}_matrix"]).reshape(-1, 1, small, small)
    if weight.shape[-1] != kernel:
        raise ValueError(f"no kernel of {kernel}: the matrices are {sorted(matrices)}")
    return weight
