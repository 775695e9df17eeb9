"""The compiled executor (`native/tinytl.h`), through ctypes: neither PyTorch nor numpy is needed."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from tinytl.errors import InputError

ABI = 1
"""TINYTL_ABI of native/tinytl.h."""

OK, BAD_FILE, BAD_INPUT, NOT_FINITE, NO_MEMORY = range(5)
"""Statuses, as tinytl.h has them."""

KEYS = (
    *("batch", "micro_batch", "classes", "height", "width", "arena_bytes", "arena_used", "state_bytes", "threads"),
    *("tensors", "steps", "meta_bytes", "evaluate_images", "data_bytes"),
)
"""What `tinytl_number` tells, by its key."""

HERE = Path(__file__).parent
MISSING = (
    "the executor of compiled programs was not built when tinytl was installed: install a C++17 compiler "
    "(such as g++ or clang++) and install tinytl again; the lab (tinytl[lab]) works without it"
)

_pointer, _integer, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "tinytl_abi": (ctypes.c_int, []),
    "tinytl_error": (ctypes.c_char_p, []),
    "tinytl_isa": (ctypes.c_char_p, []),
    "tinytl_open": (ctypes.c_int, [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(_pointer)]),
    "tinytl_close": (None, [_pointer]),
    "tinytl_number": (_integer, [_pointer, ctypes.c_int]),
    "tinytl_meta": (_pointer, [_pointer]),
    "tinytl_images": (_pointer, [_pointer]),
    "tinytl_labels": (_pointer, [_pointer]),
    "tinytl_step": (
        ctypes.c_int,
        [_pointer, _integer, _real, _integer, ctypes.POINTER(_real), ctypes.POINTER(_integer)],
    ),
    "tinytl_bad_tensor": (_integer, [_pointer]),
    "tinytl_evaluate": (ctypes.c_int, [_pointer, _integer, _pointer]),
    "tinytl_state": (_pointer, [_pointer]),
    "tinytl_run": (ctypes.c_int, [_pointer, ctypes.c_int, *[_integer] * 5, _real, _integer]),
    "tinytl_instructions": (_integer, [_pointer, ctypes.c_int]),
    "tinytl_op": (ctypes.c_char_p, [_pointer, ctypes.c_int, _integer]),
    "tinytl_tensor": (_pointer, [_pointer, _integer, ctypes.POINTER(_integer)]),
    "tinytl_timing": (None, [_pointer, ctypes.c_int]),
    "tinytl_seconds": (ctypes.c_int, [_pointer, ctypes.c_int, _pointer]),
    "tinytl_gemm_peak": (_real, [_pointer]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The library that was built with this package.

    Raises:
        InputError: it was not built, or was built for another machine or another version of tinytl.
    """
    path = HERE / "libtinytl.so"
    if not path.exists():
        raise InputError(MISSING)
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be loaded ({error}): install tinytl again on this machine") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name, None)
        if function is None:
            raise InputError(f"{path} has no {name}: it is of another version: install tinytl again")
        function.restype, function.argtypes = result, arguments
    if (abi := found.tinytl_abi()) != ABI:
        raise InputError(f"{path} has interface {abi}, this tinytl needs {ABI}: install tinytl again")
    return found


def stand_alone() -> Path:
    """The program `tinytl-step`, which runs training steps without Python.

    Raises:
        InputError: it was not built.
    """
    path = HERE / "tinytl-step"
    if not path.exists():
        raise InputError(MISSING)
    return path
