"""Lean operations: exact gradients, and for backward nothing kept but what each one's rule states.

`tinytl.ops.functional` has them as functions; `chain` runs a straight line of them as one.
"""

from .activation import Activation
from .batch_norm import FrozenBatchNorm
from .chain import ChainKeeps, Stage, chain, chain_keeps, fuse, observe_chains
from .conv import Conv2d, Padding
from .group_norm import GroupNorm
from .linear import Linear
from .pool import AvgPool2d, GlobalMean
from .upsample import UpsampleBilinear
from .weight_standardization import standardize

__all__ = [
    "Activation",
    "AvgPool2d",
    "ChainKeeps",
    "Conv2d",
    "FrozenBatchNorm",
    "GlobalMean",
    "GroupNorm",
    "Linear",
    "Padding",
    "Stage",
    "UpsampleBilinear",
    "chain",
    "chain_keeps",
    "fuse",
    "observe_chains",
    "standardize",
]
