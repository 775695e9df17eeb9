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
from tinytl.nn.layers import Conv2dSame, Residual, ShortcutBlock, SqueezeExcite, StandardizedConv2d
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
    LeanShortcutBlock,
    LeanSqueezeExcite,
    is_hooked,
)
from tinytl.nn.lite_residual import LiteBlock
from tinytl.ops.activation import Activation
from tinytl.ops.max_pool import LARGEST_WINDOW, MaxPool2d
from tinytl.ops.pool import AdaptiveAvgPool2d, AvgPool2d, GlobalMean
from tinytl.ops.smooth_activation import SmoothActivation
from tinytl.ops.squeeze_excite import SqueezeExcite as SqueezeExciteOp

from ._traced import OWN_CONTAINERS, TracedModules

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

    def __init__(self, traced: TracedModules | None = None) -> None:
        self._traced = traced
        self.folded: list[str] = []
        self.origins: dict[str, str] = {}
        # A module used in two places stays one module. The old one is held, so that its id does not come up again.
        self._done: dict[int, tuple[nn.Module, nn.Module]] = {}

    def run(self, module: nn.Module, path: str = "") -> nn.Module:
        """The lean form of `module`, whose children are lowered in place."""
        if id(module) not in self._done:
            lean = self._lower(module, path)
            if lean is not module:
                _refuse_hooks(module, path)
                lean.training = module.training  # its own alone: a child may be in another mode
            self._done[id(module)] = (module, lean)
        return self._done[id(module)][1]

    def _lower(self, module: nn.Module, path: str) -> nn.Module:
        kind, traced = type(module), self._traced
        if traced is not None and traced.is_opaque(path):
            return module
        own = traced is not None and traced.has(path)
        if kind is nn.Sequential and path and own and not (traced is not None and traced.has_region(path)):
            return self._sequential(module, path)
        if is_leaf(module):
            return self._leaf(module, path)
        if own and kind not in OWN_CONTAINERS:
            assert traced is not None
            self._fold_children_(module, path, traced)
        for name, child in _children(module):
            setattr(module, name, self.run(child, _join(path, name)))
        if own and kind not in OWN_CONTAINERS:
            assert traced is not None
            traced.attach_(module, path)
        if isinstance(module, Residual) and kind is Residual:
            return LeanResidual(module)
        if isinstance(module, ShortcutBlock) and kind is ShortcutBlock:
            return LeanShortcutBlock(module)
        if isinstance(module, LiteBlock) and kind is LiteBlock:
            return LeanLiteBlock(module)
        return module

    def _leaf(self, module: nn.Module, path: str) -> nn.Module:
        kind = type(module)
        if kind in CONVOLUTIONS:
            return self._convolution(module, path)
        if isinstance(module, SqueezeExcite) and kind is SqueezeExcite:
            return _squeeze_excite(module, path)
        return _LEAVES[kind](module, path)

    def _fold_children_(self, module: nn.Module, path: str, traced: TracedModules) -> None:
        """Fold batch norms of any type into the convolutions that a traced forward calls right before them."""
        for name, follower in traced.pairs(module, path):
            conv, norm = module.get_submodule(name), module.get_submodule(follower)
            norm_path = _join(path, follower)
            if type(norm) in BATCH_NORMS:
                after: nn.Module = nn.Identity().train(norm.training)
            elif traced.starts_with_its_norm(norm, norm_path):
                after = norm
            else:
                continue
            if not _folds(conv, norm):
                continue
            lean = self._convolution(conv, _join(path, name), norm, norm_path)
            if after is norm:
                traced.without_its_norm_(norm, norm_path)
            for child, new in ((name, lean), (follower, after)):
                parent, _, last = child.rpartition(".")
                setattr(module.get_submodule(parent), last, new)
            self._done[id(lean)] = (lean, lean)

    def _is_called_here(self, path: str, name: str) -> bool:
        """Whether nobody but the Sequential at `path` uses its child."""
        child, traced = _join(path, name), self._traced
        return traced is None or (traced.calls(child) == traced.calls(path) and not traced.is_lent(child))

    def _sequential(self, module: nn.Module, path: str) -> nn.Module:
        children: OrderedDict[str, nn.Module] = OrderedDict()
        entries = _children(module)
        at = 0
        while at < len(entries):
            name, child = entries[at]
            follower = entries[at + 1] if at + 1 < len(entries) else None
            free = all(self._is_called_here(path, n) for n, _ in entries[at : at + 2])
            if follower is not None and free and type(follower[1]) in BATCH_NORMS and _folds(child, follower[1]):
                children[name] = self._convolution(child, _join(path, name), follower[1], _join(path, follower[0]))
                children[follower[0]] = nn.Identity().train(follower[1].training)  # every layer keeps its number
                at += 1
            else:
                children[name] = self.run(child, _join(path, name))
            at += 1
        return LeanSequential(children)

    def _convolution(self, conv: Any, path: str, norm: Any = None, norm_path: str = "") -> nn.Module:
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
    if type(conv) not in CONVOLUTIONS or not is_leaf(conv):
        return False
    trains = norm.weight is not None and norm.weight.requires_grad
    return conv.weight.requires_grad or not trains  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def _adaptive_pool(module: Any, path: str) -> nn.Module:
    size = _pair(module.output_size)
    return LeanFixed(GlobalMean(keep_dims=True) if size == (1, 1) else AdaptiveAvgPool2d(size))


def _pair(value: Any) -> tuple[Any, Any]:
    """One value for both sides, or a pair of them."""
    return (value[0], value[1]) if isinstance(value, (tuple, list)) else (value, value)


def _max_pool(module: Any, path: str) -> nn.Module:
    if module.return_indices:
        raise UnsupportedLayerError(
            f"{path} (MaxPool2d, return_indices=True): expected return_indices=False; the lean form keeps each "
            "winner's place inside its window only"
        )
    kernel = _pair(module.kernel_size)
    if kernel[0] * kernel[1] > LARGEST_WINDOW:
        raise UnsupportedLayerError(
            f"{path} (MaxPool2d, kernel_size={kernel}): expected a window of {LARGEST_WINDOW} pixels at most; "
            "pool in two steps"
        )
    options = (_pair(module.stride), _pair(module.padding), _pair(module.dilation), module.ceil_mode)
    return LeanFixed(MaxPool2d(kernel, *options))


def _hard_tanh(module: Any, path: str) -> nn.Module:
    return LeanFixed(Activation(lo=float(module.min_val), hi=float(module.max_val)))


def _smooth(kind: Any) -> Callable[[Any, str], nn.Module]:
    return lambda module, path: LeanFixed(SmoothActivation(kind))


def _gelu(module: Any, path: str) -> nn.Module:
    return LeanFixed(SmoothActivation("gelu" if module.approximate == "none" else "gelu_tanh"))


def _squeeze_excite(module: SqueezeExcite, path: str) -> nn.Module:
    """One operation for the four layers."""
    gate: Any = _SMOOTH.get(type(module.gate))
    act: Any = "relu" if type(module.act) is nn.ReLU else _SMOOTH.get(type(module.act))
    for name, found in (("act", act), ("gate", gate)):
        if found is None:
            known = ", ".join(sorted(kind.__name__ for kind in _SMOOTH)) + (", ReLU" if name == "act" else "")
            kind = type(getattr(module, name)).__name__
            raise UnsupportedLayerError(f"{_join(path, name)} ({kind}): expected one of {known}")
    for name, child in _children(module):
        _refuse_hooks(child, _join(path, name))
        if name in ("fc1", "fc2") and type(child) is not nn.Conv2d:
            raise UnsupportedLayerError(f"{_join(path, name)} ({type(child).__name__}): expected a 1x1 Conv2d")
    return LeanSqueezeExcite(module, SqueezeExciteOp(act, gate))


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


_SMOOTH: dict[type[nn.Module], Any] = {
    nn.Hardswish: "hard_swish",
    nn.Hardsigmoid: "hard_sigmoid",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Mish: "mish",
}

_LEAVES: dict[type[nn.Module], Callable[[Any, str], nn.Module]] = {
    nn.BatchNorm2d: lambda m, path: LeanFrozenBatchNorm2d(m),
    FrozenStatsBatchNorm2d: lambda m, path: LeanFrozenBatchNorm2d(m),
    nn.GroupNorm: lambda m, path: LeanGroupNorm(m),
    nn.Linear: lambda m, path: LeanLinear(m),
    nn.ReLU: lambda m, path: LeanFixed(Activation()),
    nn.ReLU6: lambda m, path: LeanFixed(Activation(hi=6.0)),
    nn.LeakyReLU: lambda m, path: LeanFixed(Activation(slope=m.negative_slope)),
    nn.Hardtanh: _hard_tanh,
    nn.GELU: _gelu,
    nn.ELU: lambda m, path: LeanFixed(SmoothActivation("elu", m.alpha)),
    **{kind: _smooth(name) for kind, name in _SMOOTH.items()},
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.MaxPool2d: _max_pool,
    nn.Dropout: _dropout,
    **dict.fromkeys(_PASS_THROUGH, _same),
}


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is of a type, and has options, that one lean module stands for."""
    kind: Any = type(module)
    if kind in CONVOLUTIONS:
        return module.padding_mode == "zeros"
    if kind is nn.MaxPool2d:
        try:
            _max_pool(module, "")
        except UnsupportedLayerError:
            return False
    return kind in _LEAVES or kind is SqueezeExcite


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
