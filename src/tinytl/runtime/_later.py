"""Modules that others import at their top and that training never uses: loaded when something of them is asked for.

Pillow names `subprocess` for one function of its JPEG reader, Python's own `logging` and `pathlib` name what they need
for errors and for addresses. In a process that counts its memory in tens of MB that is code that nobody runs.
Python's `importlib.util.LazyLoader` is for this, but in some versions the very statement `import subprocess` makes it
load; so what stands in the module's place here answers to its own name alone.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

UNUSED = ("subprocess", "traceback", "ipaddress")
"""The process that trains is better without them; each brings others."""


def load_later(*names: str) -> None:
    """Have modules of Python's library loaded when an attribute of theirs is first asked for.

    What is loaded already stays as it is. For a process of our own, not for a library's importer: before the first
    use there is a module without its content in ``sys.modules``.
    """
    for name in names:
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            sys.modules[name] = _stand_in(importlib.util.module_from_spec(spec), spec.loader.exec_module)


def _stand_in(module: ModuleType, fill: Callable[[ModuleType], object]) -> ModuleType:
    lock, begun = threading.RLock(), False

    def get(name: str) -> Any:
        nonlocal begun
        if name.startswith("__"):  # the import system asks for these; whoever uses the module asks for something else
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        with lock:  # another thread waits until it is whole; what it imports may ask for it while it is filled
            if not begun:
                begun = True
                fill(module)
                del module.__dict__["__getattr__"]
        if name not in module.__dict__:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        return module.__dict__[name]

    module.__dict__["__getattr__"] = get
    return module
