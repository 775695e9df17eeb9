"""tinytl fine-tunes a pretrained vision network inside the memory you have, and measures every byte it claims.

    backbone = tinytl.load("efficientnet_lite0", num_classes=2)
    print(tinytl.adapt_(backbone.model, tinytl.TINYTL_LB))

`backbone.model` is then an ordinary torch.nn.Module: train it in any loop, or with `tinytl.fit`. Names are imported
when they are first used, so that `import tinytl` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbones import BACKBONES, Backbone, load
    from .data import Loader, resolve_split, scan
    from .delta import Delta, apply_delta, load_delta, save_delta
    from .engine import Evaluation, FitOptions, evaluate, fit
    from .errors import InputError, TinyTLError, UnsupportedLayerError
    from .memory import Profile, StepSpec, count, kept, profile_step
    from .methods import (
        FT_FULL,
        FT_LAST,
        FT_NORM_LAST,
        METHODS,
        TINYTL_B,
        TINYTL_L,
        TINYTL_LB,
        Adaptation,
        Bias,
        BlockBias,
        Full,
        LastBlocks,
        LiteModules,
        LiteResidual,
        Method,
        Norm,
        adapt_,
        calibrate_,
        method,
    )
    from .run import train
    from .spec import RunOptions, TrainSpec
    from .trained import open_run

__version__ = "0.1.0"

_HOME = {
    "backbones": ("BACKBONES", "Backbone", "load"),
    "data": ("Loader", "resolve_split", "scan"),
    "delta": ("Delta", "apply_delta", "load_delta", "save_delta"),
    "engine": ("Evaluation", "FitOptions", "evaluate", "fit"),
    "errors": ("InputError", "TinyTLError", "UnsupportedLayerError"),
    "memory": ("Profile", "StepSpec", "count", "kept", "profile_step"),
    "methods": (
        *("FT_FULL", "FT_LAST", "FT_NORM_LAST", "METHODS", "TINYTL_B", "TINYTL_L", "TINYTL_LB"),
        *("Adaptation", "Bias", "BlockBias", "Full", "LastBlocks", "LiteModules", "LiteResidual", "Method", "Norm"),
        *("adapt_", "calibrate_", "method"),
    ),
    "run": ("train",),
    "spec": ("RunOptions", "TrainSpec"),
    "trained": ("open_run",),
}
_ORIGIN = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "BACKBONES",
    "FT_FULL",
    "FT_LAST",
    "FT_NORM_LAST",
    "METHODS",
    "TINYTL_B",
    "TINYTL_L",
    "TINYTL_LB",
    "Adaptation",
    "Backbone",
    "Bias",
    "BlockBias",
    "Delta",
    "Evaluation",
    "FitOptions",
    "Full",
    "InputError",
    "LastBlocks",
    "LiteModules",
    "LiteResidual",
    "Loader",
    "Method",
    "Norm",
    "Profile",
    "RunOptions",
    "StepSpec",
    "TinyTLError",
    "TrainSpec",
    "UnsupportedLayerError",
    "adapt_",
    "apply_delta",
    "calibrate_",
    "count",
    "evaluate",
    "fit",
    "kept",
    "load",
    "load_delta",
    "method",
    "open_run",
    "profile_step",
    "resolve_split",
    "save_delta",
    "scan",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _ORIGIN:
        raise AttributeError(f"module 'tinytl' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ORIGIN[name]}", __name__), name)


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
