"""A lite residual module whose kernel, groups and width are chosen at every pass, of one set of weights.

The weights are those of the largest module (kernel K, the fewest groups G, full width). A choice is a cut of them:

    kernel    the centre of each K x K filter
    groups    the middle channels fall into g equal groups, of which each reads its own g-th of the input (G divides g)
    width     the first channels of each of these groups
    conv2     the columns of the middle channels that are left

What is cut has the shapes of `tinytl.nn.lite_residual.lite_residual` with that choice, and is run by that very module,
so that a sub-network taken out of the super-network computes the same bits.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tinytl.nn.frozen_norm import FrozenStatsBatchNorm2d
from tinytl.nn.layers import Norm
from tinytl.nn.lite_residual import lite_middle, lite_residual

from .space import Site, Space

Module = tuple[int, int, int]
"""Kernel, groups, width in percent."""


class SharedLite(nn.Module):
    """The lite residual modules of one slot.

    Statistics of batch norms belong to a choice, since other filters make other outputs: those of the first to (kernel,
    groups), those of the second to all three. They are measured once (`calibrate_lite_`) and stay.

    Args:
        site: what stands there.
        groups, widths: to choose from.
        norm: 'bn' or 'gn'.
    """

    def __init__(self, site: Site, groups: tuple[int, ...], widths: tuple[int, ...], norm: Norm) -> None:
        super().__init__()
        self.site = site
        self.norm: Norm = norm
        self.full = _made(site, (site.kernels[-1], groups[0], 100), norm)
        self.modules_there: tuple[Module, ...] = tuple(itertools.product(site.kernels, groups, widths))
        self._runners: dict[Module, nn.Sequential] = {}
        if norm == "bn":
            for module in self.modules_there:
                for layer, width in (("norm1", self._middle(module)), ("norm2", site.out_channels)):
                    self.register_buffer(_stat(layer, module, "mean"), torch.zeros(width))
                    self.register_buffer(_stat(layer, module, "var"), torch.ones(width))

    def forward(self, input: Tensor, module: Module) -> Tensor:
        """(N, in, H, W) -> (N, out, h, w), not yet upsampled."""
        return functional_call(self.runner(module), self.cut(module), (input,))

    def runner(self, module: Module) -> nn.Sequential:
        """The plain module of that choice, which holds no values of its own."""
        if module not in self._runners:
            with torch.device("meta"):
                made = _made(self.site, module, self.norm)
            for name, layer in made.named_children():
                if isinstance(layer, nn.BatchNorm2d):
                    setattr(made, name, FrozenStatsBatchNorm2d.of(layer))
            self._runners[module] = made.requires_grad_(False)
        return self._runners[module]

    def cut(self, module: Module) -> dict[str, Tensor]:
        """The state of the plain module of that choice, by its own names; differentiable in the shared weights."""
        kernel, groups = module[0], self._groups(module[1])
        own, rows = dict(self.full.named_parameters()), self._rows(module)
        full = own["conv1.weight"]  # (middle, in / G, K, K)
        crop = (full.shape[-1] - kernel) // 2
        share = self.site.in_channels // groups
        span = full.shape[1] // share  # groups of the choice in one group of the shared weight
        filters = []
        for group, within in enumerate(rows.reshape(groups, -1)):
            begin = group % span * share
            filters.append(full[within, begin : begin + share, crop : crop + kernel, crop : crop + kernel])
        state = {
            "conv1.weight": torch.cat(filters),
            "norm1.weight": own["norm1.weight"][rows],
            "norm1.bias": own["norm1.bias"][rows],
            "conv2.weight": own["conv2.weight"][:, rows].contiguous(),
            "norm2.weight": own["norm2.weight"],
            "norm2.bias": own["norm2.bias"],
        }
        if self.norm == "bn":
            for layer, kind in itertools.product(("norm1", "norm2"), ("mean", "var")):
                state[f"{layer}.running_{kind}"] = self.get_buffer(_stat(layer, module, kind))
                state[f"{layer}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
        return state

    def _groups(self, groups: int) -> int:
        """As the module has them: more where the block is wide."""
        return lite_middle(self.site.in_channels, groups, 100)[1]

    def _middle(self, module: Module) -> int:
        return lite_middle(self.site.in_channels, module[1], module[2])[0]

    def _rows(self, module: Module) -> Tensor:
        """Which middle channels of the shared weights a choice has, in its own order."""
        groups = self._groups(module[1])
        full, kept = self._middle((module[0], module[1], 100)), self._middle(module)
        return torch.cat([torch.arange(kept // groups) + group * (full // groups) for group in range(groups)])


def _made(site: Site, module: Module, norm: Norm) -> nn.Sequential:
    kernel, groups, width = module
    return lite_residual(
        site.in_channels,
        site.out_channels,
        stride=site.stride,
        kernel_size=kernel,
        groups=groups,
        pool=None if site.pools_globally else 2,
        norm=norm,
        width=width,
    )


def _stat(layer: str, module: Module, kind: str) -> str:
    return f"{layer}_{'_'.join(map(str, module))}_{kind}"


@torch.no_grad()
def calibrate_lite_(lite: SharedLite, layer: str, inputs: Iterable[Tensor]) -> None:
    """Measure one norm ('norm1', then 'norm2') of every choice on block inputs (N, in, H, W), and store it."""
    moments = {module: _Moments() for module in lite.modules_there}
    for input in inputs:
        for module, moment in moments.items():
            before = _before(lite.runner(module), layer)
            names = {name for name, _ in before.named_children()}
            state = {key: value for key, value in lite.cut(module).items() if key.partition(".")[0] in names}
            moment.add(functional_call(before, state, (input,)))
    for module, moment in moments.items():
        mean, var = moment.found()
        lite.get_buffer(_stat(layer, module, "mean")).copy_(mean)
        lite.get_buffer(_stat(layer, module, "var")).copy_(var)


def _before(runner: nn.Sequential, layer: str) -> nn.Sequential:
    """The layers that stand before a norm, under their own names."""
    children = OrderedDict(runner.named_children())
    names = list(children)
    return nn.Sequential(OrderedDict((name, children[name]) for name in names[: names.index(layer)]))


class _Moments:
    """Mean and variance a channel, in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = self._square = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        self._count += values.numel() // values.shape[1]
        self._sum = self._sum + values.sum((0, 2, 3), dtype=torch.float64)
        self._square = self._square + values.square().sum((0, 2, 3), dtype=torch.float64)

    def found(self) -> tuple[Tensor, Tensor]:
        mean = self._sum / self._count
        return mean, (self._square / self._count - mean.square()).clamp_(min=0.0)


def shared_lite(space: Space, norm: Norm) -> nn.ModuleDict:
    """The modules of every slot that may have one, by the slot's number as text."""
    return nn.ModuleDict(
        {str(slot): SharedLite(site, space.groups, space.widths, norm) for slot, site in enumerate(space.sites, 1)}
    )
