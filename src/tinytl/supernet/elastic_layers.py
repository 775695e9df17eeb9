"""Layers of a super-network: they hold the largest weights, and compute with the part of them that is asked for.

Which part: the first channels, and of a depthwise kernel what `elastic_kernel` makes of it. A slice is made contiguous
before it is used: an operator then sees the tensor that a static network of that size would hold, and gives its bits.

Attributes are named so that the state dict has the published keys (`tinytl.backbones.ofa_layouts`): an elastic layer
holds the layer that it slices, hence ``conv.conv.weight`` and ``bn.bn.weight``.

Source: Cai et al., "Once-for-All" (ICLR 2020, arXiv 1908.09791).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinytl.backbones.ofa_layouts import squeezed_channels
from tinytl.backbones.once_for_all import elastic_kernel, matrix_names

Activation = Callable[[], nn.Module]


class ElasticNorm(nn.Module):
    """Batch norm over the first C channels, whichever number C the input has."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), C at most that of the largest network."""
        bn, channels = self.bn, input.shape[1]
        assert bn.running_mean is not None
        assert bn.running_var is not None
        kept = bn.track_running_stats or not bn.training
        if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        return F.batch_norm(
            input,
            bn.running_mean[:channels] if kept else None,
            bn.running_var[:channels] if kept else None,
            bn.weight[:channels],
            bn.bias[:channels],
            bn.training,
            0.0 if bn.momentum is None else bn.momentum,
            bn.eps,
        )


class ElasticPointwise(nn.Module):
    """A 1x1 convolution from the first channels to the first channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, input: Tensor, out_channels: int) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H, W)."""
        return F.conv2d(input, self.conv.weight[:out_channels, : input.shape[1]].contiguous())


class ElasticDepthwise(nn.Module):
    """A depthwise convolution of the first channels, with any of the kernels.

    The learned matrices (``7to5_matrix``, ...) begin as identities: at first a smaller kernel is a larger one's centre.
    """

    def __init__(self, channels: int, kernels: tuple[int, ...], stride: int) -> None:
        super().__init__()
        largest = kernels[-1]
        self.conv = nn.Conv2d(channels, channels, largest, stride, largest // 2, groups=channels, bias=False)
        self.stride = stride
        self.matrices = tuple(name for name, _ in matrix_names(kernels))
        for name, small in matrix_names(kernels):
            self.register_parameter(name, nn.Parameter(torch.eye(small * small)))

    def forward(self, input: Tensor, kernel: int) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride))."""
        channels = input.shape[1]
        matrices: Mapping[str, Tensor] = {name: getattr(self, name) for name in self.matrices}
        weight = elastic_kernel(self.conv.weight[:channels], matrices, kernel)
        return F.conv2d(input, weight.contiguous(), None, self.stride, kernel // 2, 1, channels)


class ElasticExcite(nn.Module):
    """Squeeze and excite over the first C channels, its inner width as a network of C channels has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = squeezed_channels(channels)
        self.fc = nn.Sequential(
            OrderedDict(reduce=nn.Conv2d(channels, squeezed, 1), expand=nn.Conv2d(squeezed, channels, 1))
        )

    @property
    def reduce(self) -> nn.Conv2d:
        """From the channels to the inner width."""
        return _convolution(self.fc.get_submodule("reduce"))

    @property
    def expand(self) -> nn.Conv2d:
        """From the inner width to the channels."""
        return _convolution(self.fc.get_submodule("expand"))

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        channels = input.shape[1]
        squeezed = squeezed_channels(channels)
        (w1, b1), (w2, b2) = _affine(self.reduce), _affine(self.expand)
        mean = input.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        inner = F.relu(F.conv2d(mean, w1[:squeezed, :channels].contiguous(), b1[:squeezed]))
        return input * F.hardsigmoid(F.conv2d(inner, w2[:channels, :squeezed].contiguous(), b2[:channels]))


class PointwiseUnit(nn.Module):
    """A 1x1 convolution and its batch norm, held; the block runs them."""

    def __init__(self, in_channels: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.conv = ElasticPointwise(in_channels, out_channels)
        self.bn = ElasticNorm(out_channels, eps)


class DepthwiseUnit(nn.Module):
    """A depthwise convolution, its batch norm, and squeeze and excite where there is any, held; the block runs them."""

    def __init__(self, channels: int, kernels: tuple[int, ...], stride: int, excites: bool, eps: float) -> None:
        super().__init__()
        self.conv = ElasticDepthwise(channels, kernels, stride)
        self.bn = ElasticNorm(channels, eps)
        self.se = ElasticExcite(channels) if excites else None


class ElasticBlock(nn.Module):
    """An inverted residual of elastic kernel and width, without its shortcut."""

    def __init__(
        self,
        in_channels: int,
        middle: int,
        out_channels: int,
        kernels: tuple[int, ...],
        stride: int,
        act: Activation,
        excites: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.inverted_bottleneck = PointwiseUnit(in_channels, middle, eps)
        self.depth_conv = DepthwiseUnit(middle, kernels, stride, excites, eps)
        self.point_linear = PointwiseUnit(middle, out_channels, eps)
        self.act = act()

    def forward(self, input: Tensor, kernel: int, middle: int) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride)), by way of ``middle`` channels."""
        first, depthwise, last = self.inverted_bottleneck, self.depth_conv, self.point_linear
        x = self.act(first.bn(first.conv(input, middle)))  # (N, middle, H, W)
        x = self.act(depthwise.bn(depthwise.conv(x, kernel)))
        if depthwise.se is not None:
            x = depthwise.se(x)
        return last.bn(last.conv(x, self.out_channels))


class FixedBlock(nn.Module):
    """The first block of every sub-network: 3x3 depthwise, 1x1 linear, no expansion; without its shortcut."""

    def __init__(self, in_channels: int, out_channels: int, act: Activation, eps: float) -> None:
        super().__init__()
        self.depth_conv = FixedUnit(in_channels, in_channels, 3, 1, in_channels, act, eps)
        self.point_linear = FixedUnit(in_channels, out_channels, 1, 1, 1, nn.Identity, eps)

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H, W)."""
        return self.point_linear(self.depth_conv(input))


class FixedUnit(nn.Module):
    """Convolution, batch norm, activation, the same in every sub-network."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, groups: int, act: Activation, eps: float
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)
        self.act = act()

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        return self.act(self.bn(self.conv(input)))


def _convolution(module: nn.Module) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    return module


def _affine(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert conv.bias is not None
    return conv.weight, conv.bias
