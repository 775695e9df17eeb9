"""The device half: compiled programs run by the native executor, with neither PyTorch nor numpy in the process."""

from .executor import Executor

__all__ = ["Executor"]
