"""Tensors that have a shape, strides, a type and a lifetime, and no memory.

A step is described by running its own code on them (`tinytl.memory.capture`). They say that they lie on the CPU, so
that the code takes the way that it takes there; what they hold lies on the meta device. PyTorch's fake tensors are the
same idea with more to them, at ten times the price a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")


class Ghost(Tensor):
    """A tensor without memory. Operators on it need the mode of `tinytl.memory.capture` to be entered.

    Attributes:
        elem: the tensor on the meta device that it stands for.
        token: one object for all ghosts of a storage: it dies with the storage.
    """

    elem: Tensor
    token: object

    @staticmethod
    def __new__(cls, elem: Tensor, token: object) -> Ghost:
        """Stand for `elem`, which lies on the meta device."""
        self = Tensor._make_subclass(cls, elem, elem.requires_grad, device_for_backend_keys=_CPU)
        self.elem, self.token = elem, token
        return self

    def __init__(self, elem: Tensor, token: object) -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The CPU, whatever it is made of."""
        return _CPU

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse: only the mode knows what to write down."""
        raise RuntimeError(f"{func} was called on a described tensor outside its description")
