"""Stock building blocks of the backbones: plain ``torch.nn`` layers, nothing lean yet.

Every straight-line run of layers is an ``nn.Sequential`` (nested ones too), because surgery walks exact
types: it sees ``Sequential[conv, norm, act]`` and replaces the run by one lean operation. Tensors are N, C,
H, W.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from tinytl.errors import InputError
from tinytl.ops.weight_standardization import standardize

Norm = Literal["bn", "gn"]

NORM_EPS = 1e-3
"""eps of every batch and group norm in the backbones: EfficientNet-Lite's and the TinyTL reference's."""

GROUP_CHANNELS = 8
"""Channels a group in group norm (PAPER.md, Normalization)."""


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Padding (before, after) that TensorFlow's SAME puts around an axis of ``size`` pixels.

    The output has ceil(size / stride) pixels; an odd pixel of padding goes after (bottom, right). At stride 2
    that differs from symmetric padding, so the two give different numbers from the same weights.

    >>> same_padding(224, 3, 2), same_padding(225, 3, 2), same_padding(14, 5, 1)
    ((0, 1), (1, 1), (2, 2))
    """
    total = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
    return total // 2, total - total // 2


class Conv2dSame(nn.Conv2d):
    """A convolution with TensorFlow SAME padding, computed from the input's size at each call.

    Shapes: (N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride)). Leave ``padding`` at 0.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Pad by what SAME asks for (more at the bottom and right when odd), then convolve."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        top, bottom = same_padding(input.shape[-2], kh, sh, dh)
        left, right = same_padding(input.shape[-1], kw, sw, dw)
        if top or bottom or left or right:
            input = F.pad(input, (left, right, top, bottom))
        return F.conv2d(input, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StandardizedConv2d(nn.Conv2d):
    """A convolution that standardizes its weight (``ops/weight_standardization.py``) before it is used."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, in, H, W) with the standardized weight, symmetric zero padding."""
        return self._conv_forward(input, standardize(self.weight), self.bias)


def norm_layer(channels: int, norm: Norm, eps: float = NORM_EPS) -> nn.BatchNorm2d | nn.GroupNorm:
    """Batch norm, or group norm with 8 channels a group.

    Raises:
        InputError: unknown ``norm``, or group norm over a number of channels that 8 does not divide.
    """
    if norm == "bn":
        return nn.BatchNorm2d(channels, eps=eps)
    if norm != "gn":
        raise InputError(f"unknown norm {norm!r}: known: bn, gn")
    if channels % GROUP_CHANNELS:
        raise InputError(
            f"group norm takes {GROUP_CHANNELS} channels a group, which does not divide {channels} channels"
        )
    return nn.GroupNorm(channels // GROUP_CHANNELS, channels, eps=eps)


def conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    norm: Norm = "bn",
    act: bool | Callable[[], nn.Module] = True,
    same: bool = False,
    eps: float = NORM_EPS,
) -> nn.Sequential:
    """Convolution (no bias), norm and activation as ``Sequential`` with children ``conv``, ``norm`` and, unless
    ``act`` is False, ``act``: ReLU6, or what ``act`` makes.

    Norm 'bn' takes an ordinary convolution, 'gn' one with weight standardization. ``same`` asks for SAME
    padding instead of (kernel - 1) // 2 on each side.

    Raises:
        InputError: unknown norm; group norm over channels that 8 does not divide; ``same`` with 'gn' (no
            published network is both).
    """
    if same and norm == "gn":
        raise InputError("SAME padding goes with norm 'bn' only; take same=False with norm 'gn'")
    conv_type = Conv2dSame if same else StandardizedConv2d if norm == "gn" else nn.Conv2d
    padding = 0 if same else (kernel - 1) // 2
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = conv_type(
        in_channels, out_channels, kernel, stride=stride, padding=padding, groups=groups, bias=False
    )
    layers["norm"] = norm_layer(out_channels, norm, eps)
    if act:
        layers["act"] = nn.ReLU6() if act is True else act()
    return nn.Sequential(layers)


class Residual(nn.Module):
    """An identity shortcut: ``x + body(x)``; ``body`` keeps the shape."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return input + self.body(input)


class ShortcutBlock(Residual):
    """A block as ResNet has it: ``act(body(x) + shortcut(x))``.

    Attributes:
        body: from the block's input to its output.
        shortcut: an ``nn.Identity`` where the body keeps the shape, else what brings the input into the body's shape.
        act: the activation behind the sum.
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module, act: nn.Module) -> None:
        super().__init__(body)
        self.shortcut = shortcut
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) -> the body's output shape."""
        return self.act(self.body(input) + self.shortcut(input))


class SqueezeExcite(nn.Module):
    """Each channel times a gate that the whole image decides: ``x * gate(fc2(act(fc1(mean(x)))))``.

    Args:
        channels: of input and output.
        squeezed: width between the two layers.
        act: between the two layers; None: ReLU.
        gate: behind the second; None: sigmoid.

    The layers are 1x1 convolutions with biases, as published files store them.
    """

    def __init__(
        self, channels: int, squeezed: int, act: nn.Module | None = None, gate: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.ReLU() if act is None else act
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid() if gate is None else gate

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return input * self.gate(self.fc2(self.act(self.fc1(input.mean((2, 3), keepdim=True)))))
