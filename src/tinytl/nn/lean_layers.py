"""Modules of one lean operation each: they hold the tensors, `tinytl.ops` holds the maths.

A lean module names its stages, so that neighbours run as one chain (`tinytl.nn.lean`). Each also works alone. A frozen
weight may be held packed, in 8 or 16 bits: `weight` is None then, codes and table are buffers (`tinytl.nn.packing`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

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
from tinytl.ops.packing import Packing
from tinytl.ops.squeeze_excite import SqueezeExcite as SqueezeExciteOp

from .layers import Conv2dSame, SqueezeExcite, StandardizedConv2d

Pair = tuple[int, int]


class LeanModule(nn.Module):
    """A module that is a run of lean stages."""

    def stages(self) -> list[Stage]:
        """The operations with their tensors, in order."""
        raise NotImplementedError

    def holders(self) -> tuple[nn.Module, ...]:
        """The modules, itself or in it, whose `weight` may be held packed, in the order of `set_packing_`."""
        return ()

    def set_packing_(self, which: int, packing: Packing) -> None:
        """Compute from now on with the codes and the table that this holder has in the place of its weight."""
        raise NotImplementedError

    @eager
    def forward(self, input: Tensor) -> Tensor:
        """Run the stages as one chain."""
        return chain(input, self.stages())


CODES, TABLE = "weight_codes", "weight_table"
"""Names of the buffers in the place of a packed weight."""


def hold_packed_(holder: nn.Module, codes: Tensor, table: Tensor) -> None:
    """Put codes and table in the place of the holder's weight."""
    holder.register_parameter("weight", None)
    holder.register_buffer(CODES, codes)
    holder.register_buffer(TABLE, table)


def held(holder: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A holder's weight and nothing, or its codes and, in a tuple, their table."""
    weight: Any = holder.weight
    if weight is not None:
        return weight, ()
    found: Any = holder
    return found.weight_codes, (found.weight_table,)


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
        weight: (out, in/groups, kh, kw), standardized already if it is frozen and the original standardized it; None
            where it is held packed.
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
        weight, table = held(self)
        norm = () if self.norm is None else self.norm.tensors()
        return [(self.op, (weight, self.bias, *table, *norm))]

    def without_norm(self) -> Stage:
        """The convolution alone, as it is before its normalization."""
        weight, table = held(self)
        recipe = dataclasses.replace(self.op.recipe, norm_eps=None)
        return dataclasses.replace(self.op, recipe=recipe), (weight, self.bias, *table)

    def holders(self) -> tuple[nn.Module, ...]:
        """Itself."""
        return (self,)

    def set_packing_(self, which: int, packing: Packing) -> None:
        """The recipe of the weight begins with the codes."""
        recipe = dataclasses.replace(self.op.recipe, packing=packing)
        self.op = dataclasses.replace(self.op, recipe=recipe)

    def extra_repr(self) -> str:
        """The operation's geometry."""
        packing = self.op.recipe.packing
        how = "" if packing is None else f", {packing.kind}"
        return f"{tuple(held(self)[0].shape)}, stride={self.op.stride}, groups={self.op.groups}{how}"


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
        weight, table = held(self)
        return [(self.op, (weight, self.bias, *table))]

    def holders(self) -> tuple[nn.Module, ...]:
        """Itself."""
        return (self,)

    def set_packing_(self, which: int, packing: Packing) -> None:
        """The product takes the codes."""
        self.op = dataclasses.replace(self.op, packing=packing)


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
        (w1, table1), (w2, table2) = held(self.fc1), held(self.fc2)
        return [(self.op, (w1, self.fc1.bias, w2, self.fc2.bias, *table1, *table2))]

    def holders(self) -> tuple[nn.Module, ...]:
        """Both layers."""
        return self.fc1, self.fc2

    def set_packing_(self, which: int, packing: Packing) -> None:
        """The operation takes that layer's codes."""
        first, second = self.op.packings
        self.op = dataclasses.replace(self.op, packings=(packing, second) if which == 0 else (first, packing))


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
