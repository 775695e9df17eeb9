"""A chain of convolutions, run one strip of rows after another.

A strip of the last output needs a few more rows of each tensor before it than it has itself (the halo): as many as its
windows reach. They are found from the output backwards, and the rows in a halo are computed for both strips. Zeros are
padded at the image's own borders only. So of everything between input and output only one strip is alive at a time,
and the values are those of the whole image.

    rows [a, b) of y need rows [a s - p, (b - 1) s - p + d (k - 1) + 1) of x      (stride s, padding p, dilation d)

Backward goes strip by strip as well. Each strip is a function of its rows of the input, and they add up to the whole
gradient where strips overlap, as do the gradients of weights and biases. Kept is what the operations keep, for every
strip: the masks of a halo's rows twice, the chain's own input once. A chain that runs again in backward keeps its
input, and runs one strip again at a time.

A chain with any other operation than convolutions and elementwise ones (a group norm, pooling) is run whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._layout import dense
from ._line import REMEMBERED, Line, Plan, full_precision
from ._line import line as line_of
from ._op import Op, Shape
from .activation import Activation
from .batch_norm import FrozenBatchNorm
from .conv import Conv2d, Padding
from .smooth_activation import SmoothActivation

Rows = tuple[int, int]  # from the first row up to, and without, the second

_ELEMENTWISE: tuple[type[Op], ...] = (Activation, FrozenBatchNorm, SmoothActivation)

_count: ContextVar[int] = ContextVar("strips", default=1)


@contextlib.contextmanager
def in_strips(count: int) -> Iterator[None]:
    """Chains that start while the context lasts, in this thread, are cut into that many strips, where they can be."""
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)


def strips_now() -> int:
    """Into how many strips a chain that starts now is cut."""
    return _count.get()


@dataclass(frozen=True)
class Strip:
    """One strip of a chain: the rows that it takes of the input, and makes of the output; operations padded for it."""

    ops: tuple[Op, ...]
    rows: Rows
    out_rows: Rows

    def line(self, recompute: bool | None) -> Line:
        """The strip as a line; `recompute` as for `chain`."""
        return line_of(self.ops, recompute)

    def shape(self, x_shape: Shape) -> Shape:
        """Of its part of an input (N, C, H, W)."""
        return (*x_shape[:2], self.rows[1] - self.rows[0], x_shape[3])


@functools.lru_cache(maxsize=REMEMBERED)
def strips_of(ops: tuple[Op, ...], x_shape: Shape, count: int) -> tuple[Strip, ...] | None:
    """`count` strips of about equal height, fewer where the output has fewer rows; None: the chain is run whole."""
    if count < 2 or len(x_shape) != 4 or not any(type(op) is Conv2d for op in ops):
        return None
    if not all(type(op) is Conv2d or type(op) in _ELEMENTWISE for op in ops):
        return None
    shapes: list[Shape] = [x_shape]
    for op in ops:
        shapes.append(op.out_shape(shapes[-1]))
    height = shapes.pop()[2]
    count = min(count, height)
    bounds = [i * height // count for i in range(count + 1)] if count > 1 else []
    found = [_strip(ops, shapes, (begin, end)) for begin, end in itertools.pairwise(bounds)]
    strips = tuple(strip for strip in found if strip is not None)
    return strips if found and len(strips) == len(found) else None


def _strip(ops: tuple[Op, ...], shapes: Sequence[Shape], out_rows: Rows) -> Strip | None:
    """The strip that makes those rows of the output; None if some operation in it would see nothing but padding."""
    rows, fitted = out_rows, []
    for op, shape in zip(reversed(ops), reversed(shapes), strict=True):
        if isinstance(op, Conv2d):
            op, rows = _fitted(op, shape, rows)
            if rows[0] >= rows[1]:
                return None
        fitted.append(op)
    return Strip(tuple(reversed(fitted)), rows, out_rows)


def _fitted(op: Conv2d, shape: Shape, out_rows: Rows) -> tuple[Conv2d, Rows]:
    """The convolution that makes those rows of its output, and the rows of its input, of that shape, that it takes."""
    (kernel, stride, dilation), height = (op.kernel[0], op.stride[0], op.dilation[0]), shape[2]
    top = op.padding.along(0, height, kernel, stride, dilation)[0]
    begin = out_rows[0] * stride - top
    end = (out_rows[1] - 1) * stride - top + dilation * (kernel - 1) + 1
    left, right = op.padding.along(1, shape[3], op.kernel[1], op.stride[1], op.dilation[1])
    padding = Padding(max(-begin, 0), max(end - height, 0), left, right)
    return dataclasses.replace(op, padding=padding), (max(begin, 0), min(end, height))


def run_strips(line: Line, strips: tuple[Strip, ...], x: Tensor, flat: Sequence[Tensor | None]) -> Tensor:
    """Run the dense `x` through the chain `line`, whose strips these are."""
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in flat)):
        return _Strips.apply(line, strips, x, *flat)  # pyright: ignore[reportReturnType]
    with full_precision(x.device):
        return _forward(_Job(line, strips, tuple(x.shape), x.dtype, False, (False,) * len(flat)), x, flat)[0]


@dataclass(frozen=True)
class _Job:
    """What a run of strips depends on beside its tensors."""

    line: Line
    strips: tuple[Strip, ...]
    x_shape: Shape
    dtype: torch.dtype
    x_needs: bool
    needs: tuple[bool, ...]  # of the flat list

    @property
    def whole(self) -> Plan:
        return self.line.plan(self.x_shape, self.dtype, self.x_needs, self.needs)

    def part(self, strip: Strip) -> tuple[Line, Plan]:
        line = strip.line(self.line.recompute)
        return line, line.plan(strip.shape(self.x_shape), self.dtype, self.x_needs, self.needs)


_Kept = list[tuple[Tensor, ...]]


def _forward(job: _Job, x: Tensor, flat: Sequence[Tensor | None]) -> tuple[Tensor, list[_Kept]]:
    """The output, and what the operations of each strip keep: nothing if the chain runs again, never rows of `x`."""
    shape = job.line.ops[-1].out_shape(job.whole.shapes[-1])
    out: Tensor | None = None
    keeps = []
    for strip in job.strips:
        line, plan = job.part(strip)
        mine, owned = _rows(x, strip.rows)
        y, kept = line.run(mine, flat, plan.without_keeping if plan.recompute else plan.needs, owned)
        if kept[0] and kept[0][0] is mine:
            kept[0] = kept[0][1:]
        keeps.append(kept)
        out = _images(shape, y) if out is None else out
        out[:, :, slice(*strip.out_rows)].copy_(y)
        del y, mine, kept
    assert out is not None
    return out, keeps


class _Strips(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, line: Line, strips: tuple[Strip, ...], x: Tensor, *flat: Tensor | None) -> Tensor:  # type: ignore[override]
        job = _Job(line, strips, tuple(x.shape), x.dtype, ctx.needs_input_grad[2], ctx.needs_input_grad[3:])
        with full_precision(x.device):
            out, keeps = _forward(job, x, flat)
        first = job.whole.shapes[0], x.dtype, job.whole.needs[0]
        ctx.job, ctx.keeps_x = job, job.whole.recompute or line.ops[0].keeps(*first).input
        ctx.counts = [[len(group) for group in kept] for kept in keeps]
        tensors = (t for kept in keeps for group in kept for t in group)
        ctx.save_for_backward(*((x,) if ctx.keeps_x else ()), *tensors, *flat)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        job: _Job = ctx.job
        saved = ctx.saved_tensors
        x = saved[0] if ctx.keeps_x else None
        at = 1 if ctx.keeps_x else 0
        flat = saved[len(saved) - len(job.needs) :]
        grad_x = _RowSums(job.x_shape)
        grads: list[Tensor | None] = [None] * len(flat)
        with full_precision(grad.device):
            for strip, counts in zip(job.strips, ctx.counts, strict=True):
                line, plan = job.part(strip)
                kept = []
                for count in counts:
                    kept.append(saved[at : at + count])
                    at += count
                if x is not None:
                    mine = _rows(x, strip.rows)[0]
                    if plan.recompute:
                        start = line.run(mine, flat, plan.without_keeping, False, 0, plan.start)[0]
                        kept = line.run_again(start, flat, plan)
                        del start
                    else:
                        kept[0] = (mine, *kept[0])
                    del mine
                upstream, owned = _rows(grad, strip.out_rows)
                found = line.walk_back(upstream, flat, kept, plan, owned)
                del upstream, kept
                if found[0] is not None:
                    grad_x.add(strip.rows, found[0])
                for i, part in enumerate(found[1:]):
                    total = grads[i]
                    grads[i] = part if total is None or part is None else total.add_(part)
                del found
        return (None, None, grad_x.total() if job.x_needs else None, *grads)


class _RowSums:
    """The gradient of the input, put together from those of strips, which overlap or leave rows out, top to bottom."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._sum: Tensor | None = None
        self._done = 0  # rows up to here have a value

    def add(self, rows: Rows, grad: Tensor) -> None:
        """Add the gradient of those rows; `rows` begin nowhere above those of the strip before."""
        if self._sum is None:
            self._sum = _images(self._shape, grad)
        begin, end = rows
        both = min(max(self._done, begin), end)  # up to here another strip was there before
        self._sum[:, :, self._done : max(begin, self._done)].zero_()
        self._sum[:, :, begin:both].add_(grad[:, :, : both - begin])
        self._sum[:, :, both:end].copy_(grad[:, :, both - begin :])
        self._done = max(self._done, end)

    def total(self) -> Tensor | None:
        """All of it; rows that no strip took have no gradient."""
        if self._sum is not None:
            self._sum[:, :, self._done :].zero_()
        return self._sum


def _images(shape: Shape, like: Tensor) -> Tensor:
    """Room for images of that shape, channels innermost."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _rows(x: Tensor, rows: Rows) -> tuple[Tensor, bool]:
    """Those rows of `x`, dense, and whether they are a copy: of a single image they lie together as they are."""
    view = x[:, :, slice(*rows)]
    own = dense(view)
    return own, own is not view
