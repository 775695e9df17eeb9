"""Lean operations: exact gradients, and for backward nothing kept but what each one's rule states."""

from .activation import Activation
from .add import add
from .batch_norm import FrozenBatchNorm
from .chain import Stage, chain, chain_keeps, fuse, observe_chains
from .conv import Conv2d, Padding
from .functional import (
    avg_pool2d,
    conv2d,
    conv2d_norm,
    frozen_batch_norm,
    global_mean,
    group_norm,
    leaky_relu,
    linear,
    relu,
    relu6,
    upsample_bilinear,
)
from .group_norm import GroupNorm
from .linear import Linear
from .pool import AvgPool2d, GlobalMean
from .upsample import UpsampleBilinear
from .weight_standardization import standardize

__all__ = [
    "Activation",
    "AvgPool2d",
    "Conv2d",
    "FrozenBatchNorm",
    "GlobalMean",
    "GroupNorm",
    "Linear",
    "Padding",
    "Stage",
    "UpsampleBilinear",
    "add",
    "avg_pool2d",
    "chain",
    "chain_keeps",
    "conv2d",
    "conv2d_norm",
    "frozen_batch_norm",
    "fuse",
    "global_mean",
    "group_norm",
    "leaky_relu",
    "linear",
    "observe_chains",
    "relu",
    "relu6",
    "standardize",
    "upsample_bilinear",
]
