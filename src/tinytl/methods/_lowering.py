"""Lowering: the layers of a network become lean modules, in place, at the same paths.

Only exact types are replaced: a subclass has a forward of its own, and replacing it would discard that. Batch norm
behind a convolution in the same Sequential becomes part of the convolution.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from tinytl.errors import UnsupportedLayerError
from tinytl.nn.frozen_norm import FrozenStatsBatchNorm2d
from tinytl.nn.layers import Conv2dSame, Residual, StandardizedConv2d
from tinytl.nn.lean import (
    ImageDropout,
    LeanConv2d,
    LeanFixed,
    LeanFrozenBatchNorm2d,
    LeanGroupNorm,
    LeanLinear,
    LeanLiteBlock,
    LeanResidual,
    LeanSequential,
    is_hooked,
)
from tinytl.nn.lite_residual import LiteBlock
from tinytl.ops.activation import Activation
from tinytl.ops.pool import AvgPool2d, GlobalMean

CONVOLUTIONS = (nn.Conv2d, Conv2dSame, StandardizedConv2d)
BATCH_NORMS = (nn.BatchNorm2d, FrozenStatsBatchNorm2d)
NORMS = (*BATCH_NORMS, nn.GroupNorm)
_PASS_THROUGH = (nn.Identity, nn.Flatten)


class Lowering:
    """One pass over one network.

    Attributes:
        folded: paths of the normalizations that became part of a convolution.
        origins: path of a tensor after lowering -> path of the tensor it stands for before (a folded convolution's
            bias stands for the normalization's); tensors not named here kept their path.
    """

    def __init__(self) -> None:
        self.folded: list[str] = []
        self.origins: dict[str, str] = {}
        self._done: dict[int, nn.Module] = {}  # a module used in two places stays one module

    def run(self, module: nn.Module, path: str = "") -> nn.Module:
        """The lean form of `module`, whose children are lowered in place."""
        if id(module) not in self._done:
            lean = self._lower(module, path)
            if lean is not module:
                _refuse_hooks(module, path)
                lean.training = module.training  # its own alone: a child may be in another mode
            self._done[id(module)] = lean
        return self._done[id(module)]

    def _lower(self, module: nn.Module, path: str) -> nn.Module:
        kind = type(module)
        if kind is nn.Sequential:
            return self._sequential(module, path)
        if kind in CONVOLUTIONS:
            return self._convolution(module, path)
        make = _LEAVES.get(kind)
        if make is not None:
            return make(module, path)
        for name, child in _children(module):
            setattr(module, name, self.run(child, _join(path, name)))
        if isinstance(module, Residual) and kind is Residual:
            return LeanResidual(module)
        if isinstance(module, LiteBlock) and kind is LiteBlock:
            return LeanLiteBlock(module)
        return module

    def _sequential(self, module: nn.Module, path: str) -> nn.Module:
        children: OrderedDict[str, nn.Module] = OrderedDict()
        entries = _children(module)
        at = 0
        while at < len(entries):
            name, child = entries[at]
            follower = entries[at + 1] if at + 1 < len(entries) else None
            if follower is not None and _folds(child, follower[1]):
                children[name] = self._convolution(child, _join(path, name), follower[1], _join(path, follower[0]))
                children[follower[0]] = nn.Identity().train(follower[1].training)  # every layer keeps its number
                at += 1
            else:
                children[name] = self.run(child, _join(path, name))
            at += 1
        return LeanSequential(children)

    def _convolution(self, conv: Any, path: str, norm: Any = None, norm_path: str = "") -> nn.Module:
        if conv.padding_mode != "zeros":
            raise UnsupportedLayerError(
                f"{path} (Conv2d, padding_mode={conv.padding_mode!r}): expected padding_mode='zeros'; "
                "pad with a layer of its own in front of the convolution"
            )
        lean = LeanConv2d(conv, norm)
        lean.train(conv.training)
        if norm is not None:
            _refuse_hooks(conv, path)
            _refuse_hooks(norm, norm_path)
            self.folded.append(norm_path)
            if lean.norm is not None:
                for name in lean.norm.state_dict():
                    self.origins[f"{path}.norm.{name}"] = f"{norm_path}.{name}"
            elif norm.bias is not None:
                self.origins[f"{path}.bias"] = f"{norm_path}.bias"
        return lean


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """All children by name. (`named_children` leaves out a module that it has named before.)"""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _refuse_hooks(module: nn.Module, path: str) -> None:
    if is_hooked(module):
        raise UnsupportedLayerError(
            f"{path} ({type(module).__name__}): has hooks, which its lean form would lose (weight_norm and pruning "
            "use them too): remove them, adapt, and register them again"
        )


def _folds(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether a batch norm can be part of the convolution before it.

    Not where its scale trains behind a frozen weight: the scale's gradient would then need the weight's.
    """
    if type(conv) not in CONVOLUTIONS or type(norm) not in BATCH_NORMS:
        return False
    trains = norm.weight is not None and norm.weight.requires_grad
    return conv.weight.requires_grad or not trains  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def _global_mean(module: Any, path: str) -> nn.Module:
    if module.output_size not in (1, (1, 1)):
        raise UnsupportedLayerError(
            f"{path} (AdaptiveAvgPool2d to {module.output_size}): expected 1; use AvgPool2d for other sizes"
        )
    return LeanFixed(GlobalMean(keep_dims=True))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _average_pool(module: Any, path: str) -> nn.Module:
    op = AvgPool2d(
        *(_pair(module.kernel_size), _pair(module.stride), _pair(module.padding)),
        *(module.ceil_mode, module.count_include_pad, module.divisor_override),
    )
    return LeanFixed(op)


def _dropout(module: Any, path: str) -> nn.Module:
    return ImageDropout(module.p)


def _same(module: nn.Module, path: str) -> nn.Module:
    return module


_LEAVES: dict[type[nn.Module], Callable[[Any, str], nn.Module]] = {
    nn.BatchNorm2d: lambda m, path: LeanFrozenBatchNorm2d(m),
    FrozenStatsBatchNorm2d: lambda m, path: LeanFrozenBatchNorm2d(m),
    nn.GroupNorm: lambda m, path: LeanGroupNorm(m),
    nn.Linear: lambda m, path: LeanLinear(m),
    nn.ReLU: lambda m, path: LeanFixed(Activation()),
    nn.ReLU6: lambda m, path: LeanFixed(Activation(hi=6.0)),
    nn.LeakyReLU: lambda m, path: LeanFixed(Activation(slope=m.negative_slope)),
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _global_mean,
    nn.Dropout: _dropout,
    **dict.fromkeys(_PASS_THROUGH, _same),
}

SUPPORTED_LEAVES = frozenset({*CONVOLUTIONS, *_LEAVES})
"""Exact types of the layers that adaptation understands."""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
