"""The compiled passes of native/lab_kernels.cpp, through ctypes; `KERNELS` is None where they were not built."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._ghost import Ghost

_ABI = 4


def _load() -> ctypes.CDLL | None:
    for path in sorted(Path(__file__).parent.glob("_lab_kernels*.so")):
        try:
            library = ctypes.CDLL(str(path))
            if library.tinytl_lab_abi() != _ABI:
                continue  # a left-over of another version
        except (OSError, AttributeError):
            continue  # built for another machine
        pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        for suffix in ("f32", "f64"):
            activation = getattr(library, f"tinytl_activation_{suffix}")
            activation.argtypes = [pointer, integer, pointer, real, real, real]
            activation.restype = None
            masked_grad = getattr(library, f"tinytl_masked_grad_{suffix}")
            masked_grad.argtypes = [
                pointer,
                pointer,
                integer,
                integer,
                pointer,
                real,
                pointer,
                integer,
                pointer,
            ]
            masked_grad.restype = None
            for name in ("max_pool", "max_pool_grad", "depthwise_weight_grad"):
                run = getattr(library, f"tinytl_{name}_{suffix}")
                run.argtypes = [pointer] * 4
                run.restype = None
            for name in ("gather_windows", "scatter_windows"):
                run = getattr(library, f"tinytl_{name}_{suffix}")
                run.argtypes = [pointer] * 3 + [integer] * 2
                run.restype = None
            group_norm = getattr(library, f"tinytl_group_norm_{suffix}")
            group_norm.argtypes = [*[pointer] * 6, *[integer] * 4, real, pointer, integer]
            group_norm.restype = None
            group_norm_grad = getattr(library, f"tinytl_group_norm_grad_{suffix}")
            group_norm_grad.argtypes = [*[pointer] * 8, *[integer] * 4, pointer, integer]
            group_norm_grad.restype = None
        return library
    return None


KERNELS: Any = _load()

SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
"""Types that the compiled passes serve -> the end of their names."""


def run(kernels: Any, name: str, like: Tensor, *arguments: Any) -> None:
    """Call the pass `name` for tensors of the type of `like`; tensors among the arguments are given by address.

    On ghosts, by which a step is described without running it, there is nothing to compute.
    """
    if not isinstance(like, Ghost):
        call = getattr(kernels, f"tinytl_{name}_{SUFFIX[like.dtype]}")
        call(*(a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments))


def serves(kernels: Any, x: Tensor) -> bool:
    """Whether `kernels` are there and compute with tensors like `x`."""
    return kernels is not None and x.device.type == "cpu" and x.dtype in SUFFIX
