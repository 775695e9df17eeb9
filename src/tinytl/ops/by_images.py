"""A stretch of a forward that is run some images at a time, while its input and output are those of all images.

What lives only while the stretch runs, in either pass, is that of a few images then; what it keeps for backward is what
it would keep for all of them at once. Exact for whatever computes each image by itself, as everything does whose
statistics are frozen. Gradients of parameters are the sums over the images' gradients.

Each part's graph is kept, its output is not: that is copied to its place in the output of all, and what backward needs
of it is where it came from (`GradientEdge`). With `recompute` the input alone is kept, and each part's graph is made
again when backward comes to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tinytl.errors import InputError

from .region import announce, autocast_now, random_states, replayed

Run = Callable[[Tensor], Tensor]


def by_images(
    run: Run,
    x: Tensor,
    trained: Sequence[Tensor],
    images: int,
    *,
    recompute: bool = False,
    random: bool = False,
    name: str = "",
) -> Tensor:
    """`run(x)`, that many images of `x` (N, ...) at a time.

    Args:
        run: pure: from images to as many outputs, each image by itself; it uses `trained` beside them. Random numbers
            are drawn part by part: a run that draws image by image, once, draws what it would draw for all at once.
        x: the images.
        trained: all other tensors that it uses and that require a gradient.
        images: how many at a time.
        recompute: keep only `x`, and run again in backward.
        random: whether it draws random numbers.
        name: for messages and the ledger.

    Raises:
        InputError: `run` gives another number of outputs than it was given images.
    """
    job = _Job(run, images, recompute, random, name)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *trained)):
        if recompute:
            announce(name, [x], random_states(x.device) if random else ())
        return _ByImages.apply(job, x, *trained)  # pyright: ignore[reportReturnType]
    out = _Images(len(x), name)
    for part in job.parts(len(x)):
        out.put(part, job.run(x[part]))
    return out.all()


@dataclass(frozen=True)
class _Job:
    run: Run
    images: int
    recompute: bool
    random: bool
    name: str

    def parts(self, count: int) -> Iterator[slice]:
        """Which images are run together, out of `count`; one empty part of none."""
        return (slice(at, min(at + self.images, count)) for at in range(0, max(count, 1), self.images))


class _ByImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, x: Tensor, *trained: Tensor) -> Tensor:  # type: ignore[override]
        ctx.job, ctx.shape, ctx.autocast = job, x.shape, autocast_now(x.device)
        out = _Images(len(x), job.name)
        if job.recompute:
            states = random_states(x.device) if job.random else ()
            ctx.states = len(states)
            ctx.save_for_backward(x, *trained, *states)
            for part in job.parts(len(x)):
                out.put(part, job.run(x[part]))
            return out.all()
        ctx.trained, ctx.edges = trained, []
        token = x.new_empty(0).requires_grad_()
        for part in job.parts(len(x)):
            piece, begin = x[part], None
            with torch.enable_grad():
                if ctx.needs_input_grad[1]:
                    piece = _Begin.apply(token, [piece])
                    begin = get_gradient_edge(piece)
                y = job.run(piece)
            del piece
            out.put(part, y)
            ctx.edges.append((begin, get_gradient_edge(y) if y.requires_grad else None))
            del y
        return out.all()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        job: _Job = ctx.job
        total = _Images(ctx.shape[0], job.name)
        sums = _Sums(sum(ctx.needs_input_grad[2:]), grad)
        pieces = _again(ctx) if job.recompute else _kept(ctx)
        for part, (begin, end, trained) in zip(job.parts(ctx.shape[0]), pieces, strict=True):
            keep = not job.recompute and _keeps_graph()
            wanted: Any = [edge for edge in (begin, *trained) if edge is not None]
            found: list[Tensor | None] = [None] * len(wanted)
            if end is not None and wanted:
                found = list(torch.autograd.grad([end], wanted, [grad[part]], keep, allow_unused=True))
            del end, wanted
            if begin is not None:
                mine = found.pop(0)
                total.put(part, _zeros(ctx, part, grad) if mine is None else mine)
                del mine
            del begin
            sums.add(found)
            del found
        own = iter(sums.found)
        grads = (next(own) if need else None for need in ctx.needs_input_grad[2:])
        return (None, total.all() if ctx.needs_input_grad[1] else None, *grads)


_Piece = tuple["GradientEdge | Tensor | None", "GradientEdge | None", "list[Tensor]"]


def _kept(ctx: Any) -> Iterator[_Piece]:
    """Of each part, where its graph begins and ends, and what trains in it."""
    trained = [t for t, need in zip(ctx.trained, ctx.needs_input_grad[2:], strict=True) if need]
    for i in range(len(ctx.edges)):
        if ctx.edges[i] is None:
            raise RuntimeError(
                f"{ctx.job.name or 'a part of the network'}: trying to go backward through the graph a second time; "
                "ask for retain_graph=True the first time"
            )
        begin, end = ctx.edges[i]
        if not _keeps_graph():
            ctx.edges[i] = None
        yield begin, end, trained
        del begin, end


def _again(ctx: Any) -> Iterator[_Piece]:
    """The same, each graph made again."""
    job: _Job = ctx.job
    saved = ctx.saved_tensors
    (x, *trained), states = saved[: len(saved) - ctx.states], saved[len(saved) - ctx.states :]
    trained = [t for t, need in zip(trained, ctx.needs_input_grad[2:], strict=True) if need]
    with replayed(states, x.device) if states else contextlib.nullcontext():
        for part in job.parts(ctx.shape[0]):
            piece = x[part].detach().requires_grad_(ctx.needs_input_grad[1])
            with torch.enable_grad(), ctx.autocast():
                y = job.run(piece)
            end = get_gradient_edge(y) if y.requires_grad else None
            del y
            yield piece if ctx.needs_input_grad[1] else None, end, trained
            del piece, end


class _Begin(torch.autograd.Function):
    """Where a part's graph begins: images that require a gradient, and a graph that does not hold on to them."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, held: list[Tensor]) -> Tensor:  # type: ignore[override]
        return held[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, None  # what arrives here is taken from the edge


class _Images:
    """Room for all images, filled some at a time."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._all: Tensor | None = None

    def put(self, part: slice, values: Tensor) -> None:
        """Copy the values of those images to their place."""
        if not isinstance(values, Tensor) or values.dim() == 0 or len(values) != part.stop - part.start:
            what = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"{self._name}: made {what} of {part.stop - part.start} images; expected a tensor with one row an "
                "image: run this part with images=None"
            )
        with torch.no_grad():
            if self._all is None:
                last = values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
                layout = torch.channels_last if last else torch.contiguous_format
                shape = (self._count, *values.shape[1:])
                self._all = torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=layout)
            self._all[part].copy_(values)

    def all(self) -> Tensor:
        """All that was put."""
        assert self._all is not None
        return self._all


class _Sums:
    """Gradients of the trained tensors, added up over the parts, in the first part's own tensors."""

    def __init__(self, count: int, grad: Tensor) -> None:
        self.found: list[Tensor | None] = [None] * count
        self._held = {grad.untyped_storage()._cdata}  # storages that something else may hold as well

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add one part's."""
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            total = self.found[i]
            if total is not None:
                total.add_(grad)
                continue
            storage = grad.untyped_storage()._cdata
            self.found[i] = grad.clone() if storage in self._held else grad
            self._held.add(storage)


def _zeros(ctx: Any, part: slice, like: Tensor) -> Tensor:
    return like.new_zeros((part.stop - part.start, *ctx.shape[1:]))


def _keeps_graph() -> bool:
    """Whether the backward pass that runs now was asked to keep its graph."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())  # pyright: ignore[reportAttributeAccessIssue]
