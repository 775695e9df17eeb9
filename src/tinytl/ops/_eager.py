"""Keep a function out of torch.compile, with its own type: `torch.compiler.disable` forgets it for type checkers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Run `function` as it is inside compiled code; what stands around it is compiled.

    The passes of a chain are compiled already, and tracing them would lose what a chain may overwrite.
    """
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]
