"""Lean operations: exact gradients, and for backward nothing kept but what each one's rule states.

`tinytl.ops.functional` has them as functions; `chain` runs a straight line of them as one.
"""

from .activation import Activation
from .batch_norm import FrozenBatchNorm
from .chain import ChainKeeps, Stage, chain, chain_keeps, fuse, observe_chains
from .conv import Conv2d, Padding
from .group_norm import GroupNorm
from .linear import Linear
from .max_pool import MaxPool2d
from .pool import AdaptiveAvgPool2d, AvgPool2d, GlobalMean
from .smooth_activation import SmoothActivation
from .squeeze_excite import SqueezeExcite
from .upsample import UpsampleBilinear
from .weight_standardization import standardize

__all__ = [
    "Activation",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "ChainKeeps",
    "Conv2d",
    "FrozenBatchNorm",
    "GlobalMean",
    "GroupNorm",
    "Linear",
    "MaxPool2d",
    "Padding",
    "SmoothActivation",
    "SqueezeExcite",
    "Stage",
    "UpsampleBilinear",
    "chain",
    "chain_keeps",
    "fuse",
    "observe_chains",
    "standardize",
]
