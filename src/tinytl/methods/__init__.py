"""Methods: what trains, and the surgery that makes a network train just that."""

from .adaptation import Adaptation, adapt_
from .calibration import calibrate_
from .identity import base_hash
from .method import (
    DESCRIPTIONS,
    FT_FULL,
    FT_LAST,
    FT_NORM_LAST,
    METHODS,
    TINYTL_B,
    TINYTL_L,
    TINYTL_LB,
    Bias,
    Full,
    LastBlocks,
    LiteResidual,
    Method,
    Norm,
    Part,
    method,
)

__all__ = [
    "DESCRIPTIONS",
    "FT_FULL",
    "FT_LAST",
    "FT_NORM_LAST",
    "METHODS",
    "TINYTL_B",
    "TINYTL_L",
    "TINYTL_LB",
    "Adaptation",
    "Bias",
    "Full",
    "LastBlocks",
    "LiteResidual",
    "Method",
    "Norm",
    "Part",
    "adapt_",
    "base_hash",
    "calibrate_",
    "method",
]
