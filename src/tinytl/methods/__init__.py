"""Methods: what trains, and the surgery that makes a network train just that."""

from ._ghost import lower_ghost_
from ._text import FORMS as PART_FORMS
from .adaptation import Adaptation, adapt_, stock_trace
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
    Method,
    method,
)
from .parts import Bias, BlockBias, Full, LastBlocks, LiteModules, LiteResidual, Norm, Part

__all__ = [
    "DESCRIPTIONS",
    "FT_FULL",
    "FT_LAST",
    "FT_NORM_LAST",
    "METHODS",
    "PART_FORMS",
    "TINYTL_B",
    "TINYTL_L",
    "TINYTL_LB",
    "Adaptation",
    "Bias",
    "BlockBias",
    "Full",
    "LastBlocks",
    "LiteModules",
    "LiteResidual",
    "Method",
    "Norm",
    "Part",
    "adapt_",
    "base_hash",
    "calibrate_",
    "lower_ghost_",
    "method",
    "stock_trace",
]
