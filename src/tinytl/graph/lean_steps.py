"""Which functions of PyTorch are lean operations, and with what options.

Only a call that the operation reproduces exactly is named here; any other stays the function that it is. A size that
was read off a tensor is no option of an operation, which is static.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from tinytl.ops import (
    Activation,
    AdaptiveAvgPool2d,
    AvgPool2d,
    Conv2d,
    FrozenBatchNorm,
    GlobalMean,
    GroupNorm,
    Linear,
    MaxPool2d,
    Padding,
    SmoothActivation,
    UpsampleBilinear,
)
from tinytl.ops._op import Op
from tinytl.ops.max_pool import LARGEST_WINDOW

from .sizes import KnownFloat, KnownInt


class LeanCall(NamedTuple):
    """An operation, and which of the function's arguments are its tensors (None: absent)."""

    op: Op
    tensors: tuple[str | None, ...] = ()


class _Entry(NamedTuple):
    names: tuple[str, ...]  # of the arguments, in order
    defaults: dict[str, Any]
    make: Callable[[dict[str, Any]], LeanCall | None]


def lean_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[LeanCall, dict[str, Any]] | None:
    """The lean operation for a call of the function `name`, with its arguments by name; None if it has none."""
    entry = _TABLE.get(name)
    if entry is None or len(args) > len(entry.names):
        return None
    bound = {**entry.defaults, **dict(zip(entry.names, args, strict=False)), **kwargs}
    if not set(bound) <= {*entry.names, *entry.defaults}:
        return None
    if not isinstance(bound.get("input"), Tensor) or not all(map(_static, bound.values())):
        return None
    found = entry.make(bound)
    return None if found is None else (found, bound)


def _static(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_static, value))
    return not isinstance(value, (KnownInt, KnownFloat))


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)):
        return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
    return (value, value)


def _conv(a: dict[str, Any]) -> LeanCall | None:
    weight = a["weight"]
    if a["input"].dim() != 4 or weight.dim() != 4:
        return None
    padding = a["padding"]
    if isinstance(padding, str):
        sides = Padding(same=True) if padding == "same" else Padding()
    else:
        sides = Padding.symmetric(*_pair(padding))
    op = Conv2d(
        kernel=(weight.shape[2], weight.shape[3]),
        stride=_pair(a["stride"]),
        padding=sides,
        dilation=_pair(a["dilation"]),
        groups=a["groups"],
        out_channels=weight.shape[0],
    )
    return LeanCall(op, ("weight", "bias"))


def _linear(a: dict[str, Any]) -> LeanCall | None:
    return LeanCall(Linear(a["weight"].shape[0]), ("weight", "bias")) if a["weight"].dim() == 2 else None


def _batch_norm(a: dict[str, Any]) -> LeanCall | None:
    if a["training"] or a["input"].dim() < 2:
        return None
    return LeanCall(FrozenBatchNorm(a["eps"]), ("weight", "bias", "running_mean", "running_var"))


def _max_pool(a: dict[str, Any]) -> LeanCall | None:
    kernel = _pair(a["kernel_size"])
    if a["return_indices"] or a["input"].dim() != 4 or kernel[0] * kernel[1] > LARGEST_WINDOW:
        return None
    stride = kernel if a["stride"] in (None, ()) else _pair(a["stride"])
    return LeanCall(MaxPool2d(kernel, stride, _pair(a["padding"]), _pair(a["dilation"]), a["ceil_mode"]))


def _avg_pool(a: dict[str, Any]) -> LeanCall | None:
    if a["input"].dim() != 4:
        return None
    kernel = _pair(a["kernel_size"])
    stride = kernel if a["stride"] in (None, ()) else _pair(a["stride"])
    rest = (a["ceil_mode"], a["count_include_pad"], a["divisor_override"])
    return LeanCall(AvgPool2d(kernel, stride, _pair(a["padding"]), *rest))


def _adaptive_pool(a: dict[str, Any]) -> LeanCall | None:
    if a["input"].dim() != 4:
        return None
    size = _pair(a["output_size"])
    return LeanCall(GlobalMean(keep_dims=True) if size == (1, 1) else AdaptiveAvgPool2d(size))


def _mean(a: dict[str, Any]) -> LeanCall | None:
    dims = a["dim"] if isinstance(a["dim"], (tuple, list)) else (a["dim"],)
    if a["input"].dim() != 4 or a["dtype"] is not None or None in dims or {d % 4 for d in dims} != {2, 3}:
        return None
    return LeanCall(GlobalMean(keep_dims=bool(a["keepdim"])))


def _interpolate(a: dict[str, Any]) -> LeanCall | None:
    plain = a["scale_factor"] is None and not a["align_corners"] and not a["antialias"]
    if a["mode"] != "bilinear" or not plain or a["input"].dim() != 4:
        return None
    return LeanCall(UpsampleBilinear(_pair(a["size"])))


def _leaky(a: dict[str, Any]) -> LeanCall | None:
    return LeanCall(Activation(slope=float(a["negative_slope"]))) if a["negative_slope"] >= 0 else None


def _gelu(a: dict[str, Any]) -> LeanCall | None:
    return LeanCall(SmoothActivation("gelu" if a["approximate"] == "none" else "gelu_tanh"))


def _fixed(op: Op) -> _Entry:
    return _Entry(("input", "inplace"), {"inplace": False}, lambda a: LeanCall(op))


def _everywhere(name: str, entry: _Entry) -> dict[str, _Entry]:
    """A function under all names that it goes by: in torch, as a method, and each of them in place."""
    homes = ("torch", "torch.Tensor", "torch.nn.functional")
    return {f"{home}.{name}{suffix}": entry for home in homes for suffix in ("", "_")}


_F = "torch.nn.functional."
_CONV = _Entry(
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    _conv,
)
_LINEAR = _Entry(("input", "weight", "bias"), {"bias": None}, _linear)
_MAX_POOL = _Entry(
    ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
    _max_pool,
)
_MEAN = _Entry(("input", "dim", "keepdim"), {"dim": None, "keepdim": False, "dtype": None}, _mean)

_TABLE: dict[str, _Entry] = {
    **_everywhere("relu", _fixed(Activation())),
    **_everywhere("relu6", _fixed(Activation(hi=6.0))),
    **_everywhere("sigmoid", _fixed(SmoothActivation("sigmoid"))),
    **_everywhere("tanh", _fixed(SmoothActivation("tanh"))),
    **_everywhere("silu", _fixed(SmoothActivation("silu"))),
    **_everywhere("hardswish", _fixed(SmoothActivation("hard_swish"))),
    **_everywhere("hardsigmoid", _fixed(SmoothActivation("hard_sigmoid"))),
    **_everywhere("mish", _fixed(SmoothActivation("mish"))),
    **_everywhere(
        "hardtanh",
        _Entry(
            ("input", "min_val", "max_val", "inplace"),
            {"min_val": -1.0, "max_val": 1.0, "inplace": False},
            lambda a: LeanCall(Activation(lo=float(a["min_val"]), hi=float(a["max_val"]))),
        ),
    ),
    **_everywhere(
        "leaky_relu",
        _Entry(("input", "negative_slope", "inplace"), {"negative_slope": 0.01, "inplace": False}, _leaky),
    ),
    **_everywhere(
        "elu",
        _Entry(
            ("input", "alpha", "inplace"),
            {"alpha": 1.0, "inplace": False},
            lambda a: LeanCall(SmoothActivation("elu", float(a["alpha"]))),
        ),
    ),
    _F + "gelu": _Entry(("input",), {"approximate": "none"}, _gelu),
    _F + "conv2d": _CONV,
    "torch.conv2d": _CONV,
    _F + "linear": _LINEAR,
    _F + "batch_norm": _Entry(
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5},
        _batch_norm,
    ),
    _F + "group_norm": _Entry(
        ("input", "num_groups", "weight", "bias", "eps"),
        {"weight": None, "bias": None, "eps": 1e-5},
        lambda a: LeanCall(GroupNorm(a["num_groups"], a["eps"]), ("weight", "bias")),
    ),
    _F + "max_pool2d": _MAX_POOL,
    "torch.max_pool2d": _MAX_POOL,
    _F + "avg_pool2d": _Entry(
        ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None},
        _avg_pool,
    ),
    _F + "adaptive_avg_pool2d": _Entry(("input", "output_size"), {}, _adaptive_pool),
    "torch.mean": _MEAN,
    "torch.Tensor.mean": _MEAN,
    _F + "interpolate": _Entry(
        ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
        {
            **dict.fromkeys(("size", "scale_factor", "align_corners", "recompute_scale_factor")),
            "mode": "nearest",
            "antialias": False,
        },
        _interpolate,
    ),
}
