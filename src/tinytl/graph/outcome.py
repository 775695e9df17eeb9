"""What a known layer or lean operation makes of tensors without values: a shape, and whether a gradient flows.

PyTorch's own kernels for tensors without memory are slow Python for the commonest layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .lean_steps import LeanCall

_ELEMENTWISE = (
    *(_BatchNorm, nn.GroupNorm),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.ELU),
    *(nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Mish),
)


def run_leaf(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What the forward of a layer gives for tensors without values."""
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(module, _ELEMENTWISE):
        return forward(*args, **kwargs)
    x, channels = args[0], getattr(module, "num_features", getattr(module, "num_channels", None))
    if channels is not None and (x.dim() < 2 or x.shape[1] != channels):
        return forward(x)  # which raises
    if getattr(module, "inplace", False):
        with torch.no_grad():
            return x.zero_()
    return _made(torch.empty_like(x), (x, *module.parameters()))


def has_effect(name: str | None, lean: tuple[LeanCall, dict[str, Any]]) -> bool:
    """Whether the call of a function writes to its input."""
    return bool(lean[1].get("inplace")) or str(name).endswith("_")


def shape_of(lean: tuple[LeanCall, dict[str, Any]]) -> Tensor:
    """What a lean operation gives for tensors without values."""
    (op, names), bound = lean
    x = bound["input"]
    shape = op.out_shape(tuple(x.shape))
    if min(shape, default=1) < 1:
        raise RuntimeError(f"{type(op).__name__} of an input {tuple(x.shape)}: nothing would be left")
    return _made(x.new_empty(shape), (x, *(bound[name] for name in names if name is not None)))


def resized(name: str | None, args: Any, kwargs: Any) -> Tensor | None:
    """What bilinear interpolation to a size gives; None for any other function."""
    if name != "torch.nn.functional.interpolate" or kwargs.get("mode") != "bilinear":
        return None
    x, size = args[0], kwargs.get("size", args[1] if len(args) > 1 else None)
    if not isinstance(x, Tensor) or x.dim() != 4 or not isinstance(size, (tuple, list)) or len(size) != 2:
        return None
    return _made(x.new_empty((*x.shape[:2], *(int(side) for side in size))), (x,))


def _made(y: Tensor, sources: Iterable[Tensor | None]) -> Tensor:
    needs = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources)
    # not a leaf of the graph, which may not be written to
    return y.requires_grad_().clone() if needs else y
