"""Lean networks: a `LeanSequential` runs the stages of neighbouring lean children as one chain.

So a whole inverted bottleneck is one autograd node. The lean modules of one operation each are in `lean_layers.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import cast

import torch
from torch import Tensor, nn

from tinytl.ops._eager import eager
from tinytl.ops.chain import Stage, chain
from tinytl.ops.upsample import UpsampleBilinear

from .layers import Residual, ShortcutBlock
from .lean_layers import (
    LeanConv2d,
    LeanFixed,
    LeanFrozenBatchNorm2d,
    LeanGroupNorm,
    LeanLinear,
    LeanModule,
    LeanSqueezeExcite,
    NormStatistics,
)
from .lite_residual import LiteBlock

__all__ = [
    "ImageDropout",
    "LeanConv2d",
    "LeanFixed",
    "LeanForward",
    "LeanFrozenBatchNorm2d",
    "LeanGroupNorm",
    "LeanLinear",
    "LeanLiteBlock",
    "LeanModule",
    "LeanResidual",
    "LeanSequential",
    "LeanShortcutBlock",
    "LeanSqueezeExcite",
    "NormStatistics",
    "image_dropout",
    "is_hooked",
    "stages_of",
    "take_dropout",
]

Pair = tuple[int, int]


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
        stages, first = stages_of(self.lite), _runs_again(self.block)
        # Backward goes the other way round: a block that runs again does so while no gradient of the module is alive.
        small = chain(input, stages) if stages and first else None
        out = self.block(input)
        up: Stage = (UpsampleBilinear(cast(Pair, tuple(out.shape[-2:]))), ())
        if small is not None:
            return _add_into(chain(small, [up]), out)
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
    taker = _dropout_taker.get()
    if taker is not None:
        return taker(input, p)
    mask = torch.empty_like(input)
    for image in mask:
        image.bernoulli_(1.0 - p)
    return input * mask.div_(1.0 - p) if p < 1.0 else input * mask


DropoutTaker = Callable[[Tensor, float], Tensor]
_dropout_taker: ContextVar[DropoutTaker | None] = ContextVar("dropout taker", default=None)


@contextlib.contextmanager
def take_dropout(taker: DropoutTaker) -> Iterator[None]:
    """Let `taker(input, p)` make the output of every dropout while the context lasts, in this thread."""
    token = _dropout_taker.set(taker)
    try:
        yield
    finally:
        _dropout_taker.reset(token)


class LeanForward:
    """What stands in the place of a module's own forward, as the attribute `forward` of the module."""

    def stages(self) -> list[Stage] | None:
        """The whole forward as lean stages, or None if it is more than a straight line of them."""
        raise NotImplementedError

    def own_tensors(self) -> list[Tensor]:
        """The parameters and buffers that it takes itself, not by calling the layer that they belong to."""
        raise NotImplementedError


def stages_of(module: nn.Module) -> list[Stage] | None:
    """The stages of a lean module or of a LeanSequential of nothing else; None for any other module.

    A module with hooks is called as a module, so that they run: None as well. So is one with a policy of its own
    (`tinytl.nn.execution`), which stands in the place of its forward.
    """
    if is_hooked(module):
        return None
    own = vars(module).get("forward")
    if isinstance(own, LeanForward):
        return own.stages()
    if isinstance(module, (LeanModule, LeanSequential)):
        return module.stages()
    return [] if type(module) is nn.Identity else None


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(tables)


def _runs_again(block: nn.Module) -> bool:
    """Whether the block's main line is a chain that keeps its input and runs again in backward."""
    stages = stages_of(block.body if isinstance(block, LeanResidual) else block)
    return stages is not None and any(op.recompute for op, _ in stages)


def _add_into(fresh: Tensor, other: Tensor) -> Tensor:
    """`fresh + other`, in `fresh`, the output of a chain that nobody else has seen, where types allow."""
    return fresh.add_(other) if fresh.dtype == other.dtype else fresh + other
