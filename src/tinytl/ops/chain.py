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
import functools
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
from ._line import REMEMBERED, Line, Plan, full_precision
from ._line import line as line_of
from ._op import Op, Shape, Tensors
from .activation import Activation
from .conv import Conv2d
from .max_pool import MaxPool2d
from .strips import run_strips, strips_now, strips_of

Stage = tuple[Op, Tensors]


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, line: Line, owned: bool, x: Tensor, *flat: Tensor | None) -> Tensor:  # type: ignore[override]
        plan = line.plan(tuple(x.shape), x.dtype, ctx.needs_input_grad[2], ctx.needs_input_grad[3:])
        with full_precision(x.device):
            if plan.recompute:
                held = line.run(x, flat, plan.without_keeping, owned, 0, plan.start)[0]
                y = line.run(held, flat, plan.without_keeping, False, plan.start)[0]
                kept = [(held,)]
            else:
                y, kept = line.run(x, flat, plan.needs, owned)
        if owned and y is x:
            ctx.mark_dirty(x)
        ctx.line, ctx.plan, ctx.counts = line, plan, [len(k) for k in kept]
        ctx.save_for_backward(*(t for group in kept for t in group), *flat)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        line: Line = ctx.line
        plan: Plan = ctx.plan
        saved = ctx.saved_tensors
        flat = saved[sum(ctx.counts) :]
        with full_precision(grad.device):
            if plan.recompute:
                kept = line.run_again(saved[0], flat, plan)
            else:
                kept, at = [], 0
                for count in ctx.counts:
                    kept.append(saved[at : at + count])
                    at += count
            del saved
            return (None, None, *line.walk_back(grad, flat, kept, plan))


@eager
def chain(x: Tensor, stages: Sequence[Stage], *, recompute: bool | None = None, owned: bool = False) -> Tensor:
    """Run `x` through `stages` [(operation, its tensors), ...], keeping for backward only what their rules say.

    Args:
        x: the input; images are (N, C, H, W) and are brought into channels-last order if they are not.
        stages: in order. A convolution with an activation right behind it is run as one.
        recompute: keep only `x` and run again in backward; by default where an operation asks for it.
        owned: nobody else holds `x`, nor did autograd save it: the first operation may overwrite it.

    Inside `tinytl.ops.strips.in_strips` it is run one strip of rows after the other, where its operations allow that.

    Raises:
        RuntimeError: in backward, for a gradient of a gradient, which is not defined here.
    """
    stages = fuse(stages)
    taker = _taker.get()
    taken = None if taker is None else taker(x, stages)
    if taken is not None:
        return taken
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and x.dtype != torch.float64:  # which PyTorch's own autocast leaves alone as well
        x = x.to(torch.get_autocast_dtype(kind))
    return _run(x, stages, recompute, owned)


def _run(x: Tensor, stages: list[Stage], recompute: bool | None, owned: bool) -> Tensor:
    if not stages:
        return x
    given = x
    x = dense(x)
    owned = owned or x is not given
    if recompute is None and _keeping.get():
        recompute = False
    observer = _observer.get()
    if observer is not None:
        observer(x, stages, recompute)
    line = line_of(tuple(op for op, _ in stages), recompute)
    flat = [tensor for _, tensors in stages for tensor in tensors]
    strips = strips_of(line.ops, tuple(x.shape), strips_now())
    if strips is not None:
        return run_strips(line, strips, x, flat)
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in flat)):
        return _Chain.apply(line, owned, x, *flat)
    plan = line.plan(tuple(x.shape), x.dtype, False, (False,) * len(flat))
    with full_precision(x.device):
        return line.run(x, flat, plan.needs, owned)[0]


def fuse(stages: Sequence[Stage]) -> list[Stage]:
    """The same stages, cheaper.

    An activation right behind a convolution becomes part of it: one pass over memory fewer in backward. One right in
    front of max pooling, if it never falls, goes behind it, where there is less to mask: the greatest pixel stays the
    greatest, and where several become equal, at a bound, no gradient passes.
    """
    fused: list[Stage] = []
    for op, tensors in stages:
        last = fused[-1][0] if fused else None
        act = last if type(last) is Activation else last.activation if type(last) is Conv2d else None
        if type(op) is Activation and type(last) is Conv2d and act is None:
            fused[-1] = (_fused(last, op), fused[-1][1])
        elif type(op) is MaxPool2d and act is not None and act.slope == 0.0:
            if type(last) is Conv2d:
                fused[-1] = (_fused(last, None), fused[-1][1])
            else:
                del fused[-1]
            fused += [(op, tensors), (act, ())]
        else:
            fused.append((op, tensors))
    return fused


@functools.lru_cache(maxsize=REMEMBERED)
def _fused(conv: Conv2d, activation: Activation | None) -> Conv2d:
    return dataclasses.replace(conv, activation=activation)


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
    strips: int = 1,
) -> list[ChainKeeps]:
    """The rule of a whole chain of fused `stages` without running it: all that it keeps for backward.

    Args:
        x_shape: shape of the chain's input.
        dtype: its type.
        stages: as for `chain`.
        x_needs: whether the input needs a gradient.
        recompute: as for `chain`.
        strips: into how many strips of rows it is cut, where its operations allow that.
    """
    line = line_of(tuple(op for op, _ in stages), recompute)
    flags = tuple(tensor is not None and tensor.requires_grad for _, tensors in stages for tensor in tensors)
    plan = line.plan(x_shape, dtype, x_needs, flags)
    cut = strips_of(line.ops, x_shape, strips)
    if plan.recompute:
        start = plan.start if cut is None else 0
        return [ChainKeeps(start, "input", _bytes(plan.shapes[start], dtype), start == 0)]
    rules = _rules(line, plan, dtype)
    if cut is None:
        return rules
    found = [rule for rule in rules if rule.is_chain_input]  # once, as it is
    for strip in cut:
        part = strip.line(line.recompute)
        mine = part.plan(strip.shape(x_shape), dtype, x_needs, flags)
        found += [rule for rule in _rules(part, mine, dtype) if not rule.is_chain_input]
    return found


def _rules(line: Line, plan: Plan, dtype: torch.dtype) -> list[ChainKeeps]:
    """What each operation keeps, for a chain that does not run again."""
    found = []
    for i, (op, shape, need) in enumerate(zip(line.ops, plan.shapes, plan.needs, strict=True)):
        rule = op.keeps(shape, dtype, need)
        if rule.input:
            found.append(ChainKeeps(i, "input", _bytes(shape, dtype), i == 0))
        if rule.extra_bytes:
            found.append(ChainKeeps(i, rule.extra, rule.extra_bytes, False))
    return found


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


_keeping: ContextVar[bool] = ContextVar("keeping", default=False)


@contextlib.contextmanager
def without_recompute() -> Iterator[None]:
    """Chains keep what their operations keep while the context lasts: for code that runs again itself."""
    token = _keeping.set(True)
    try:
        yield
    finally:
        _keeping.reset(token)


Observer = Callable[[Tensor, list[Stage], "bool | None"], None]
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextlib.contextmanager
def observe_chains(observer: Observer) -> Iterator[None]:
    """Call `observer(x, fused stages, recompute)` for every chain that starts while the context lasts, in this thread.

    `recompute` as for `chain`.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


Taker = Callable[[Tensor, list[Stage]], "Tensor | None"]
_taker: ContextVar[Taker | None] = ContextVar("taker", default=None)


@contextlib.contextmanager
def take_chains(taker: Taker) -> Iterator[None]:
    """Let `taker(x, fused stages)` make the output of every chain while the context lasts, in this thread.

    Where it returns None the chain runs as ever.
    """
    token = _taker.set(taker)
    try:
        yield
    finally:
        _taker.reset(token)
