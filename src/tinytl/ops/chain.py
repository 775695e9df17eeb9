"""A straight line of lean operations, run as one autograd Function.

Inside a chain nobody else holds the intermediate tensors. So forward overwrites where it can and frees the rest at
once, and backward may overwrite the gradients that travel through: the mask of a ReLU is applied in place, with the
bias gradient summed in the same pass. One operation at a time could do neither, since autograd may share a gradient
between branches.

Between the passes a chain keeps the sum of what its operations keep. Where one of them asks for it (group norm keeps
its whole input), the chain keeps its own input instead and runs forward again in backward: exact, and the price is
one more forward pass of that chain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._eager import eager
from ._layout import dense
from ._op import Needs, Op, Shape, Tensors
from .activation import Activation
from .conv import Conv2d

Stage = tuple[Op, Tensors]


@dataclass(frozen=True)
class _Line:
    """A chain without its tensors: operations in order, and which tensors of the flat list are whose."""

    ops: tuple[Op, ...]
    recompute: bool

    def split(self, flat: Sequence[Any]) -> list[Sequence[Any]]:
        parts, at = [], 0
        for op in self.ops:
            parts.append(flat[at : at + op.tensor_count])
            at += op.tensor_count
        return parts

    def needs(self, x: bool, flat: Sequence[bool]) -> list[Needs]:
        found = []
        for part in self.split(flat):
            found.append(Needs(x, tuple(part)))
            x = found[-1].any
        return found

    def run(self, x: Tensor, flat: Tensors, needs: Sequence[Needs]) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Forward. The first operation does not own `x`; each later one owns what the one before made."""
        kept, owned = [], False
        for op, tensors, need in zip(self.ops, self.split(flat), needs, strict=True):
            y, mine = op.forward(x, tensors, need, owned)
            owned = owned or y is not x
            kept.append(mine)
            x = y
        return x, kept

    def shapes(self, x_shape: Shape) -> list[Shape]:
        """Shape of each operation's input."""
        found = [x_shape]
        for op in self.ops[:-1]:
            found.append(op.out_shape(found[-1]))
        return found


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, line: _Line, x: Tensor, *flat: Tensor | None) -> Tensor:  # type: ignore[override]
        needs = line.needs(ctx.needs_input_grad[1], ctx.needs_input_grad[2:])
        nothing = [Needs(False, (False,) * len(n.tensors)) for n in needs]
        with _full_precision(x.device):
            y, kept = line.run(x, flat, nothing if line.recompute else needs)
        if line.recompute:
            kept = [(x,)]
        ctx.line, ctx.x_shape, ctx.counts = line, tuple(x.shape), [len(k) for k in kept]
        ctx.save_for_backward(*(t for group in kept for t in group), *flat)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        line: _Line = ctx.line
        saved = ctx.saved_tensors
        flat = saved[sum(ctx.counts) :]
        needs = line.needs(ctx.needs_input_grad[1], ctx.needs_input_grad[2:])
        with _full_precision(grad.device):
            if line.recompute:
                kept = line.run(saved[0], flat, needs)[1]
            else:
                kept, at = [], 0
                for count in ctx.counts:
                    kept.append(saved[at : at + count])
                    at += count
            del saved
            return (None, *_walk_back(line, grad, ctx.x_shape, flat, kept, needs))


def _walk_back(
    line: _Line,
    grad: Tensor,
    x_shape: Shape,
    flat: Tensors,
    kept: list[tuple[Tensor, ...]],
    needs: list[Needs],
) -> list[Tensor | None]:
    """Gradients of x and of every tensor of the flat list, last operation first."""
    shapes = line.shapes(x_shape)
    parts = line.split(flat)
    grads: list[tuple[Tensor | None, ...]] = [(None,) * len(part) for part in parts]
    own = dense(grad)
    owned = own is not grad
    travelling: Tensor | None = own
    del own, grad
    for i in reversed(range(len(line.ops))):
        if not needs[i].any:
            break  # nothing at or before this operation trains
        assert travelling is not None
        mine = kept.pop()
        before = travelling
        travelling, grads[i] = line.ops[i].backward(before, shapes[i], parts[i], mine, needs[i], owned)
        owned = owned or travelling is not before
        del mine, before
    return [travelling if needs[0].x else None, *(g for group in grads for g in group)]


@eager
def chain(x: Tensor, stages: Sequence[Stage], *, recompute: bool | None = None) -> Tensor:
    """Run `x` through `stages` [(operation, its tensors), ...], keeping for backward only what their rules say.

    Args:
        x: the input; images are (N, C, H, W) and are brought into channels-last order if they are not.
        stages: in order. A convolution with an activation right behind it is run as one.
        recompute: keep only `x` and run again in backward; by default where an operation asks for it.

    Raises:
        RuntimeError: in backward, for a gradient of a gradient, which is not defined here.
    """
    stages = fuse(stages)
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and x.dtype != torch.float64:  # which PyTorch's own autocast leaves alone as well
        x = x.to(torch.get_autocast_dtype(kind))
    return _run(x, stages, recompute)


def _run(x: Tensor, stages: list[Stage], recompute: bool | None) -> Tensor:
    if not stages:
        return x
    x = dense(x)
    observer = _observer.get()
    if observer is not None:
        observer(x, stages)
    line = _line(stages, recompute)
    flat = [tensor for _, tensors in stages for tensor in tensors]
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *flat))
    if wanted:
        return _Chain.apply(line, x, *flat)
    with _full_precision(x.device):
        return line.run(x, flat, line.needs(False, [False] * len(flat)))[0]


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Operations inside a chain choose their types themselves: by the type of the chain's input."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext()


def _line(stages: Sequence[Stage], recompute: bool | None) -> _Line:
    ops = tuple(op for op, _ in stages)
    return _Line(ops, any(op.recompute for op in ops) if recompute is None else recompute)


def fuse(stages: Sequence[Stage]) -> list[Stage]:
    """Put an activation that stands right behind a convolution into it: one pass over memory fewer in backward."""
    fused: list[Stage] = []
    for op, tensors in stages:
        last = fused[-1][0] if fused else None
        if isinstance(op, Activation) and isinstance(last, Conv2d) and last.activation is None:
            fused[-1] = (dataclasses.replace(last, activation=op), fused[-1][1])
        else:
            fused.append((op, tensors))
    return fused


@dataclass(frozen=True)
class ChainKeeps:
    """One thing that a chain keeps: by which of its (fused) stages, what, and how many bytes.

    `is_chain_input`: it is the chain's own input, which may live anyway and which other chains may keep as well.
    """

    stage: int
    what: str
    bytes: int
    is_chain_input: bool


def chain_keeps(
    x_shape: Shape,
    dtype: torch.dtype,
    stages: Sequence[Stage],
    *,
    x_needs: bool,
    recompute: bool | None = None,
) -> list[ChainKeeps]:
    """The rule of a whole chain of fused `stages` without running it: all that it keeps for backward.

    Args:
        x_shape: shape of the chain's input.
        dtype: its type.
        stages: as for `chain`.
        x_needs: whether the input needs a gradient.
        recompute: as for `chain`.
    """
    line = _line(stages, recompute)
    flags = [tensor is not None and tensor.requires_grad for _, tensors in stages for tensor in tensors]
    needs = line.needs(x_needs, flags)
    if not any(need.any for need in needs):
        return []
    shapes = line.shapes(x_shape)
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    if line.recompute:
        return [ChainKeeps(0, "input", sizes[0], True)]
    found = []
    for i, (op, need) in enumerate(zip(line.ops, needs, strict=True)):
        rule = op.keeps(shapes[i], dtype, need)
        if rule.input:
            found.append(ChainKeeps(i, "input", sizes[i], i == 0))
        if rule.extra_bytes:
            found.append(ChainKeeps(i, rule.extra, rule.extra_bytes, False))
    return found


Observer = Callable[[Tensor, list[Stage]], None]
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextlib.contextmanager
def observe_chains(observer: Observer) -> Iterator[None]:
    """Call `observer(x, fused stages)` for every chain that starts while the context lasts, in this thread."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)
