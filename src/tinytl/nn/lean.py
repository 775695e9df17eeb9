"""Modules over the lean operations: they hold the tensors, `tinytl.ops` holds the maths.

A lean module names its stages; a `LeanSequential` runs the stages of neighbouring lean children as one chain, so that
a whole inverted bottleneck is one autograd node. Each module also works alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from tinytl.errors import UnsupportedLayerError
from tinytl.ops._eager import eager
from tinytl.ops._op import Op
from tinytl.ops._weights import WeightRecipe
from tinytl.ops.batch_norm import FrozenBatchNorm
from tinytl.ops.chain import Stage, chain
from tinytl.ops.conv import Conv2d, Padding
from tinytl.ops.group_norm import GroupNorm
from tinytl.ops.linear import Linear
from tinytl.ops.squeeze_excite import SqueezeExcite as SqueezeExciteOp
from tinytl.ops.upsample import UpsampleBilinear

from .layers import Conv2dSame, Residual, ShortcutBlock, SqueezeExcite, StandardizedConv2d
from .lite_residual import LiteBlock

Pair = tuple[int, int]


class LeanModule(nn.Module):
    """A module that is a run of lean stages."""

    def stages(self) -> list[Stage]:
        """The operations with their tensors, in order."""
        raise NotImplementedError

    @eager
    def forward(self, input: Tensor) -> Tensor:
        """Run the stages as one chain."""
        return chain(input, self.stages())


class NormStatistics(nn.Module):
    """What a frozen batch norm stores, for a convolution that computes with it: the convolution runs it."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None:
            raise UnsupportedLayerError(
                "a BatchNorm2d without running statistics cannot be frozen: "
                "it normalizes by the batch it sees; train the network with track_running_stats=True"
            )
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """gamma, beta, mean, var."""
        return self.weight, self.bias, self.running_mean, self.running_var


class LeanConv2d(LeanModule):
    """A convolution that keeps its input only where its weight trains.

    Attributes:
        weight: (out, in/groups, kh, kw), standardized already if it is frozen and the original standardized it.
        bias: (out,) or None; after folding it is the shift of the normalization.
        norm: the frozen batch norm behind it where that could not be folded for good, because the weight, or a bias
            of the convolution's own, trains.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.norm = None if norm is None else NormStatistics(norm)
        standardize = type(conv) is StandardizedConv2d
        if standardize and not conv.weight.requires_grad:
            recipe = WeightRecipe(standardize=True)
            self.weight = _frozen(cast(Tensor, recipe.make((conv.weight, None))[0]))
            standardize = False
        own_bias_trains = conv.bias is not None and conv.bias.requires_grad
        if norm is not None and not conv.weight.requires_grad and not own_bias_trains:
            self._fold(standardize)
        # the layout that the operation computes in, so that no step has to copy it, nor its gradient
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)
        self.op = Conv2d(
            kernel=cast(Pair, conv.kernel_size),
            stride=cast(Pair, conv.stride),
            padding=_padding(conv),
            dilation=cast(Pair, conv.dilation),
            groups=conv.groups,
            out_channels=conv.out_channels,
            recipe=WeightRecipe(standardize, None if self.norm is None else self.norm.eps),
        )

    def _fold(self, standardize: bool) -> None:
        """Scale and shift become weight and bias; the bias trains if the normalization's did."""
        assert self.norm is not None
        trains = self.norm.bias is not None and self.norm.bias.requires_grad
        recipe = WeightRecipe(standardize, self.norm.eps)
        with torch.no_grad():
            weight, bias = recipe.make((self.weight, self.bias, *self.norm.tensors()))
        assert bias is not None
        self.weight = _frozen(weight)
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=trains)
        self.norm = None

    def stages(self) -> list[Stage]:
        """One convolution."""
        norm = () if self.norm is None else self.norm.tensors()
        return [(self.op, (self.weight, self.bias, *norm))]

    def without_norm(self) -> Stage:
        """The convolution alone, as it is before its normalization."""
        recipe = WeightRecipe(self.op.recipe.standardize)
        return dataclasses.replace(self.op, recipe=recipe), (self.weight, self.bias)

    def extra_repr(self) -> str:
        """The operation's geometry."""
        return f"{tuple(self.weight.shape)}, stride={self.op.stride}, groups={self.op.groups}"


class LeanFrozenBatchNorm2d(LeanModule):
    """Batch norm by its stored statistics, in every mode; keeps its input only where its scale trains."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        statistics = NormStatistics(norm)
        self.weight, self.bias = statistics.weight, statistics.bias
        self.register_buffer("running_mean", statistics.running_mean)
        self.register_buffer("running_var", statistics.running_var)
        self.op = FrozenBatchNorm(norm.eps)

    def stages(self) -> list[Stage]:
        """One affine map a channel."""
        return [(self.op, (self.weight, self.bias, self.running_mean, self.running_var))]


class LeanGroupNorm(LeanModule):
    """Group norm with exact gradients; its chain runs again in backward."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.op = GroupNorm(norm.num_groups, norm.eps)

    def stages(self) -> list[Stage]:
        """One group norm."""
        return [(self.op, (self.weight, self.bias))]


class LeanLinear(LeanModule):
    """A linear layer that keeps its input only where its weight trains."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.op = Linear(linear.out_features)

    def stages(self) -> list[Stage]:
        """One matrix product."""
        return [(self.op, (self.weight, self.bias))]


class LeanFixed(LeanModule):
    """An operation without tensors: an activation, pooling, the global mean."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def stages(self) -> list[Stage]:
        """That operation."""
        return [(self.op, ())]

    def extra_repr(self) -> str:
        """The operation with its options."""
        return repr(self.op)


class LeanSqueezeExcite(LeanModule):
    """Squeeze and excite; its chain runs again in backward. `fc1` and `fc2` stay where they are, with the tensors."""

    def __init__(self, module: SqueezeExcite, op: SqueezeExciteOp) -> None:
        super().__init__()
        self.fc1, self.fc2 = module.fc1, module.fc2
        self.op = op

    def stages(self) -> list[Stage]:
        """One operation with both layers' tensors."""
        return [(self.op, (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias))]


class LeanSequential(nn.Sequential):
    """A Sequential that runs neighbouring lean children, nested ones too, as one chain."""

    def stages(self) -> list[Stage] | None:
        """The stages of all children, or None if one of them is not lean."""
        found: list[Stage] = []
        for child in self:
            mine = stages_of(child)
            if mine is None:
                return None
            found += mine
        return found

    def _runs(self) -> Iterator[nn.Module | list[Stage]]:
        run: list[Stage] = []
        for child in self:
            mine = stages_of(child)
            if mine is not None:
                run += mine
                continue
            if run:
                yield run
                run = []
            yield child
        if run:
            yield run

    @eager
    def forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As nn.Sequential."""
        for run in self._runs():
            input = chain(input, run) if isinstance(run, list) else run(input)
        return input


class LeanResidual(nn.Module):
    """`x + body(x)`, the sum in the body's own output where a chain has just made that."""

    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.body = residual.body

    @eager
    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        stages = stages_of(self.body)
        if not stages:
            return input + self.body(input)
        return _add_into(chain(input, stages), input)


class LeanShortcutBlock(nn.Module):
    """`act(body(x) + shortcut(x))`: sum and activation in the body's own output, one bit an element kept."""

    def __init__(self, block: ShortcutBlock) -> None:
        super().__init__()
        self.body, self.shortcut, self.act = block.body, block.shortcut, block.act

    @eager
    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) -> the body's output shape."""
        stages = stages_of(self.body)
        beside = self.shortcut(input)
        total = _add_into(chain(input, stages), beside) if stages else self.body(input) + beside
        act = stages_of(self.act)
        return self.act(total) if act is None else chain(total, act, owned=True)


class LeanLiteBlock(nn.Module):
    """A block and its lite residual module; the upsampling belongs to the module's chain."""

    def __init__(self, both: LiteBlock) -> None:
        super().__init__()
        self.block, self.lite = both.block, both.lite

    @eager
    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) -> the block's own output shape."""
        out = self.block(input)
        up: Stage = (UpsampleBilinear(cast(Pair, tuple(out.shape[-2:]))), ())
        stages = stages_of(self.lite)
        if stages is None:  # somebody watches a layer of it
            return out + chain(self.lite(input), [up])
        return _add_into(chain(input, [*stages, up]), out)


class ImageDropout(nn.Dropout):
    """Dropout that draws for one image after another, so that micro-batches draw what their batch would draw."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, ...) -> the same shape; keeps its mask, in the type of the input, while it trains."""
        return image_dropout(input, self.p) if self.training else input


def image_dropout(input: Tensor, p: float) -> Tensor:
    """`input`, each element 0 with probability `p` and else divided by 1 - p; one image is drawn after another."""
    if p == 0.0:
        return input
    mask = torch.empty_like(input)
    for image in mask:
        image.bernoulli_(1.0 - p)
    return input * mask.div_(1.0 - p) if p < 1.0 else input * mask


class LeanForward:
    """What stands in the place of a module's own forward, as the attribute `forward` of the module."""

    def stages(self) -> list[Stage] | None:
        """The whole forward as lean stages, or None if it is more than a straight line of them."""
        raise NotImplementedError


def stages_of(module: nn.Module) -> list[Stage] | None:
    """The stages of a lean module or of a LeanSequential of nothing else; None for any other module.

    A module with hooks is called as a module, so that they run: None as well.
    """
    if is_hooked(module):
        return None
    if isinstance(module, (LeanModule, LeanSequential)):
        return module.stages()
    own = vars(module).get("forward")
    if isinstance(own, LeanForward):
        return own.stages()
    return [] if type(module) is nn.Identity else None


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(tables)


def _add_into(fresh: Tensor, other: Tensor) -> Tensor:
    """`fresh + other`, in `fresh`, the output of a chain that nobody else has seen, where types allow."""
    return fresh.add_(other) if fresh.dtype == other.dtype else fresh + other


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)


def _padding(conv: nn.Conv2d) -> Padding:
    if type(conv) is Conv2dSame:
        return Padding(same=True)
    if isinstance(conv.padding, str):
        # torch's own "same" exists at stride 1 only, where its odd pixel lies at the bottom and right as well
        return Padding(same=True) if conv.padding == "same" else Padding()
    height, width = cast(Pair, conv.padding)
    return Padding.symmetric(height, width)
