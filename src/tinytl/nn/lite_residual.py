"""The lite residual module: a small trainable branch beside a frozen block (PAPER.md, "Lite residual
module").

::

    y = block(x) + up(norm2(conv2(relu(norm1(conv1(pool(x)))))))

A quarter of the pixels (2x2 average pooling), no widening in the middle, so its activations are ~26x smaller
than the inverted bottleneck's. ``norm2``'s scale starts at 0: a fresh module changes nothing (its first
gradient reaches only that scale and shift; the convolutions follow one step later).
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from tinytl.errors import InputError
from tinytl.nn.layers import Norm, Residual, SqueezeExcite, StandardizedConv2d, norm_layer

_WIDEST = 256


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, at least ``divisor`` and never below 90 % of
    ``channels``.

    >>> make_divisible(24), make_divisible(17.6), make_divisible(44)
    (24, 16, 48)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def lite_residual(
    in_ch: int,
    out_ch: int,
    *,
    stride: int,
    kernel_size: int = 5,
    groups: int = 2,
    pool: int | None = 2,
    norm: Norm = "bn",
    act: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Build the branch, upsampling left out, as ``Sequential`` pool, conv1, norm1, act, conv2, norm2.

    Shapes: (N, in_ch, H, W) -> (N, out_ch, h, w) with h = ceil((H // pool) / stride); (1, 1) for global
    pooling.

    Args:
        in_ch, out_ch: channels of the block's input and output.
        stride: the block's stride, carried by the group convolution.
        kernel_size: of the group convolution, odd.
        groups: of the group convolution; more where the block is wide (see ``lite_width``).
        pool: side of the average pooling; None pools globally.
        norm: 'bn', or 'gn' with weight standardization of both convolutions.
        act: makes the activation.

    Raises:
        InputError: channels that do not fit the groups or the group norm.
    """
    middle, groups = lite_width(in_ch, groups)
    if in_ch % groups or middle % groups:
        raise InputError(f"lite residual: {groups} groups do not divide {in_ch} -> {middle} channels")
    conv_type = StandardizedConv2d if norm == "gn" else nn.Conv2d
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["pool"] = nn.AdaptiveAvgPool2d(1) if pool is None else nn.AvgPool2d(pool, pool)
    layers["conv1"] = conv_type(
        in_ch, middle, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False
    )
    layers["norm1"] = norm_layer(middle, norm)
    layers["act"] = act()
    layers["conv2"] = conv_type(middle, out_ch, 1, bias=False)
    layers["norm2"] = norm_layer(out_ch, norm)
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        elif name == "norm2" and isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.zeros_(layer.weight)
    return nn.Sequential(layers)


def lite_width(in_ch: int, groups: int = 2) -> tuple[int, int]:
    """(width of the middle, groups) of the module beside a block with that many input channels.

    As wide as the input, as the paper has it, up to 256 channels, which none of its networks exceeds at a block's
    ends. ResNet's blocks are wide at the ends and narrow inside, up to 2048 channels: at the paper's width the modules
    would be eight times as large as the network. There the middle stays 256 wide, and the groups double until one of
    them reads 128 channels or fewer.

    >>> lite_width(192), lite_width(512), lite_width(2048)
    ((192, 2), (256, 4), (256, 16))
    """
    middle = min(make_divisible(in_ch), _WIDEST)
    while in_ch > _WIDEST // 2 * groups and in_ch % (2 * groups) == 0 == middle % (2 * groups):
        groups *= 2
    return middle, groups


class LiteBlock(nn.Module):
    """A block with a lite residual module beside it: ``block(x) + upsample(lite(x))``.

    Attributes:
        block: the original block, untouched (its own shortcut included).
        lite: the branch of ``lite_residual``.
    """

    def __init__(self, block: nn.Module, lite: nn.Sequential) -> None:
        super().__init__()
        self.block = block
        self.lite = lite

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) -> the block's own output shape."""
        out = self.block(input)
        lite = self.lite(input)
        if lite.shape[-2:] != out.shape[-2:]:  # at equal sizes bilinear interpolation is the identity
            lite = F.interpolate(lite, size=out.shape[-2:], mode="bilinear", align_corners=False)
        return out + lite


def lite_geometry(strides: Sequence[int], kernel_size: int = 5, first_resolution: int = 128) -> list[tuple[int, bool]]:
    """(kernel size, pools globally) of each lite module, by the reference's rule (PAPER.md).

    The rule looks at a nominal resolution, not at the real one: the first block in ``strides`` sees
    ``first_resolution`` pixels, each stride divides them. Where the pooled (halved) resolution is 1, the
    module pools globally and its kernel is 1; where it is below the kernel, the kernel shrinks by 2 until it
    fits.

    >>> lite_geometry([2, 2, 2, 2, 2, 2, 2])[3:]
    [(5, False), (3, False), (1, False), (1, True)]
    """
    geometry: list[tuple[int, bool]] = []
    resolution = first_resolution
    for stride in strides:
        pooled = max(1, resolution // 2)
        kernel = 1 if pooled == 1 else kernel_size
        while kernel > pooled:
            kernel -= 2
        geometry.append((kernel, pooled == 1))
        resolution = max(1, resolution // stride)
    return geometry


def block_shape(block: nn.Module) -> tuple[int, int, int]:
    """(in channels, out channels, stride) of a block, read off its convolutions, which must follow one another.

    Of a block of our own building (``nn/layers.py``) what stands beside the main line, a shortcut or squeeze and
    excite, is left out.

    Raises:
        InputError: no convolution, or convolutions that do not follow one another.
    """
    convs = list(_main_line(block))
    if not convs:
        raise InputError("it has no convolution")
    for first, second in itertools.pairwise(convs):
        if first.out_channels != second.in_channels:
            raise InputError(
                f"its convolutions do not follow one another ({first.out_channels} channels, then "
                f"{second.in_channels}); name a block without branches"
            )
    return convs[0].in_channels, convs[-1].out_channels, math.prod(int(conv.stride[0]) for conv in convs)


def _main_line(module: nn.Module) -> Iterator[nn.Conv2d]:
    if isinstance(module, nn.Conv2d):
        yield module
    elif not isinstance(module, SqueezeExcite):
        for child in [module.body] if isinstance(module, Residual) else module.children():
            yield from _main_line(child)


def insert_lite_blocks_(
    model: nn.Module,
    paths: Iterable[str],
    *,
    norm: Norm = "bn",
    groups: int = 2,
    kernel_size: int = 5,
    shapes: Sequence[tuple[int, int, int]] | None = None,
) -> list[str]:
    """Put a fresh lite residual module beside each block of ``model`` named in ``paths``, in place.

    ``paths`` are in forward order (``Backbone.lite_blocks`` is). ``shapes`` are the blocks' (in channels, out
    channels, stride); None: those of ``block_shape``. The new module takes the block's dtype, device and mode.

    Returns:
        The paths of the new branches, e.g. ``features.block1.lite``.

    Raises:
        InputError: a block has a lite module already, or its shape cannot be read off.
    """
    blocks = [(path, model.get_submodule(path)) for path in paths]
    found = []
    for index, (path, block) in enumerate(blocks):
        try:
            if isinstance(block, LiteBlock):
                raise InputError("it has a lite residual module already")
            found.append(block_shape(block) if shapes is None else shapes[index])
        except InputError as error:
            raise InputError(f"cannot insert a lite residual module at {path!r}: {error}") from error
    inserted = []
    geometry = lite_geometry([stride for *_, stride in found], kernel_size)
    for (path, block), (in_ch, out_ch, stride), (kernel, pools_globally) in zip(blocks, found, geometry, strict=True):
        lite = lite_residual(
            in_ch,
            out_ch,
            stride=stride,
            kernel_size=kernel,
            groups=groups,
            pool=None if pools_globally else 2,
            norm=norm,
        )
        lite.to(next(block.parameters())).train(block.training)
        both = LiteBlock(block, lite)
        both.training = block.training
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, both)
        inserted.append(f"{path}.lite")
    return inserted
