"""The compiled passes of native/lab_kernels.cpp, through ctypes; `KERNELS` is None where they were not built."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

_ABI = 1


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
        return library
    return None


KERNELS: Any = _load()
