"""What a lean operation is: its static configuration, its maths in both directions, and what it keeps in between.

An operation holds no tensors. `tinytl.ops.chain` runs a straight line of them as one autograd Function: it owns every
intermediate tensor, so an operation may be told that it owns its argument and may overwrite it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Shape = tuple[int, ...]
Tensors = Sequence[Tensor | None]
Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted: of the input `x`, and of each of the operation's tensors."""

    x: bool
    tensors: tuple[bool, ...] = ()

    @property
    def any(self) -> bool:
        """Whether backward has to come here at all."""
        return self.x or any(self.tensors)


@dataclass(frozen=True)
class Keeps:
    """The rule of what an operation keeps for backward.

    `input`: it keeps its input tensor as it is (which may be a tensor that lives anyway: the ledger counts by
    storage). `extra_bytes`: what it allocates and keeps beside that, and `extra` what that is.
    """

    input: bool = False
    extra_bytes: int = 0
    extra: str = "mask"


NOTHING = Keeps()


class Op(ABC):
    """One lean operation. Subclasses are frozen dataclasses of their static configuration."""

    tensor_count: ClassVar[int] = 0
    """How many tensors (weights, statistics; None where absent) it takes beside its input."""

    recompute: ClassVar[bool] = False
    """Whether what it keeps is so large that its chain had better run again in backward."""

    @abstractmethod
    def forward(self, x: Tensor, tensors: Tensors, needs: Needs, owned: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output, and the tensors to keep for backward. `x` is dense; it may be overwritten only if `owned`."""

    def recall(self, x: Tensor, tensors: Tensors, needs: Needs) -> tuple[Tensor, ...]:
        """What `forward` keeps, for a chain that runs again in backward and needs no output here any more.

        Operations that keep their input, and need not compute for the rest, say so here.
        """
        return self.forward(x, tensors, needs, False)[1]

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        x_shape: Shape,
        tensors: Tensors,
        kept: tuple[Tensor, ...],
        needs: Needs,
        owned: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """Gradients of the input (None unless needed) and of the tensors. `grad` may be overwritten if `owned`."""

    @abstractmethod
    def out_shape(self, x_shape: Shape) -> Shape:
        """Shape of the output for an input of that shape."""

    @abstractmethod
    def keeps(self, x_shape: Shape, dtype: torch.dtype, needs: Needs) -> Keeps:
        """The rule: exactly what `forward` keeps."""
