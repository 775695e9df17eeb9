"""The lite residual module: a small trainable branch beside a frozen block (PAPER.md, "Lite residual
module").

::

    y = block(x) + up(norm2(conv2(relu(norm1(conv1(pool(x)))))))

A quarter of the pixels (2x2 average pooling), no widening in the middle, so its activations are ~26x smaller
than the inverted bottleneck's. ``norm2``'s scale starts at 0: a fresh module changes nothing (its first
gradient reaches only that scale and shift; the convolutions follow one step later).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tinytl.errors import InputError
from tinytl.nn.layers import Norm, Residual, SqueezeExcite, StandardizedConv2d, norm_layer
from tinytl.nn.meta import on_meta

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
    width: int = 100,
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
        width: of the middle, in percent of the paper's (see ``lite_middle``).
        pool: side of the average pooling; None pools globally.
        norm: 'bn', or 'gn' with weight standardization of both convolutions.
        act: makes the activation.

    Raises:
        InputError: channels that do not fit the groups or the group norm.
    """
    middle, groups = lite_middle(in_ch, groups, width)
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


def lite_middle(in_ch: int, groups: int = 2, width_percent: int = 100) -> tuple[int, int]:
    """(width of the middle, groups) of a module at that share of the width of ``lite_width``.

    The share is rounded to the nearest multiple of 8 (half a step up) that the groups divide, one step at least and
    the full width at most; 100 percent is the full width itself.

    >>> lite_middle(96, 2, 100), lite_middle(96, 2, 50), lite_middle(16, 4, 25), lite_middle(2048, 2, 10)
    ((96, 2), (48, 2), (8, 4), (32, 16))
    """
    full, groups = lite_width(in_ch, groups)
    step = math.lcm(8, groups)
    if width_percent >= 100 or full <= step:
        return full, groups
    return min(full, max(step, (2 * width_percent * full + 100 * step) // (200 * step) * step)), groups


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
        if kernel > pooled:
            kernel -= (kernel - pooled + 1) // 2 * 2
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
    modules: Mapping[str, tuple[int, int, int]] | None = None,
) -> list[str]:
    """Put a fresh lite residual module beside blocks of ``model``, in place.

    The new module takes the block's dtype, device and mode.

    Args:
        model: the network.
        paths: of the blocks in forward order (``Backbone.lite_blocks`` is), to which ``lite_geometry`` is applied.
        norm: 'bn', or 'gn' with weight standardization.
        groups, kernel_size: of every module, without ``modules``.
        shapes: the blocks' (in channels, out channels, stride); None: those of ``block_shape``.
        modules: path -> (kernel size, groups, width in percent) of the blocks that get one; a kernel is at most what
            the geometry has for its block. A module that is there already and has that form stays. None: all of
            ``paths`` get one, at full width.

    Returns:
        The paths of the new branches, e.g. ``features.block1.lite``.

    Raises:
        InputError: a block has a lite module already (with ``modules``: of another form), or its shape cannot be read
            off, or the groups do not divide its channels.
    """
    blocks = [(path, model.get_submodule(path)) for path in paths]
    chosen = {path: (kernel_size, groups, 100) for path, _ in blocks} if modules is None else modules
    found = []
    for index, (path, block) in enumerate(blocks):
        try:
            if isinstance(block, LiteBlock) and modules is None:
                raise InputError("it has a lite residual module already")
            inner = block.block if isinstance(block, LiteBlock) else block
            found.append(block_shape(inner) if shapes is None else shapes[index])
        except InputError as error:
            raise InputError(f"cannot insert a lite residual module at {path!r}: {error}") from error
    inserted = []
    strides = [stride for *_, stride in found]
    geometry = {kernel: lite_geometry(strides, kernel) for kernel, *_ in chosen.values()}
    for index, (path, block) in enumerate(blocks):
        if path not in chosen:
            continue
        in_ch, out_ch, stride = found[index]
        asked, groups_here, width = chosen[path]
        kernel, pools_globally = geometry[asked][index]
        like = next(block.parameters())
        try:
            with on_meta() if like.is_meta else contextlib.nullcontext():
                lite = lite_residual(
                    in_ch,
                    out_ch,
                    stride=stride,
                    kernel_size=kernel,
                    groups=groups_here,
                    width=width,
                    pool=None if pools_globally else 2,
                    norm=norm,
                )
        except InputError as error:
            raise InputError(f"cannot insert a lite residual module at {path!r}: {error}") from error
        if isinstance(block, LiteBlock):
            if _form(block.lite) != _form(lite):
                raise InputError(
                    f"cannot insert a lite residual module at {path!r}: it has one already, with "
                    f"{_form(block.lite)}; asked for is one with {_form(lite)}"
                )
            continue
        lite.to(like).train(block.training)
        both = LiteBlock(block, lite)
        both.training = block.training
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, both)
        inserted.append(f"{path}.lite")
    return inserted


def _form(lite: nn.Module) -> str:
    """What tells one lite module of a block from another, in words."""
    conv: Any = lite.get_submodule("conv1")
    return f"kernel {conv.kernel_size[0]}, {conv.groups} groups and {conv.out_channels} channels in the middle"
