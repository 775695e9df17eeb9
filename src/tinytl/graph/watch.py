"""What PyTorch does inside one function: what autograd would keep for backward, and if random numbers are drawn."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Watches while it is entered.

    Attributes:
        keeps_images: autograd saves a tensor of more than a few values an image, parameters aside.
        random: random numbers are drawn.
    """

    def __init__(self, resident: set[int]) -> None:
        super().__init__()
        self.keeps_images = False
        self.random = False
        self._resident = resident
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> Watch:
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._hooks.__exit__(kind, error, traceback)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))

    def _pack(self, tensor: Tensor) -> Tensor:
        # A value a channel, as after a global mean: small beside any image, and kept as it is.
        small = sum(size > 1 for size in tensor.shape) <= (2 if tensor.dim() in (2, 4) else 1)
        if not small and tensor.untyped_storage()._cdata not in self._resident:
            self.keeps_images = True
        return tensor
