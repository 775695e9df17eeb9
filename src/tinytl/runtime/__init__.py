"""The device half: compiled programs run by the native executor, with neither PyTorch nor numpy in the process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .executor import Executor

__all__ = ["Executor"]


def __getattr__(name: str) -> Any:
    """Import the executor when it is first used: what trains decides before that what else is not to be loaded."""
    if name != "Executor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .executor import Executor

    return Executor


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__]
