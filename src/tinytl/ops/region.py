"""A stretch of a forward that keeps only what goes into it, and runs again in backward.

For what no rule of ours makes lean (a gate, an attention, a layer norm): exact, since the same functions run on the
same values; and the price is one more forward pass of the stretch. Random numbers drawn inside are drawn again alike:
the generator's state is kept with the inputs. While a stretch runs again, everything in it keeps what it likes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chain import without_recompute

Run = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
Observer = Callable[[str, Sequence[Tensor], Sequence[Tensor]], None]

_inside: ContextVar[bool] = ContextVar("inside", default=False)
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextlib.contextmanager
def observe_regions(observer: Observer) -> Iterator[None]:
    """Call `observer(name, inputs, random states)` for every region that starts while the context lasts."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def inside_region() -> bool:
    """Whether a region is running: those inside it are part of it."""
    return _inside.get()


def region(
    run: Run, inputs: Sequence[Tensor], trained: Sequence[Tensor], *, random: bool = False, name: str = ""
) -> tuple[Tensor, ...]:
    """`run(inputs)`, keeping only `inputs` for backward.

    Args:
        run: pure: from tensors to tensors, using `trained` beside them.
        inputs: what it is given.
        trained: all other tensors that it uses and that require a gradient.
        random: whether it draws random numbers.
        name: for the ledger.
    """
    observer = _observer.get()
    if observer is not None:
        observer(name, inputs, _states(inputs[0].device) if random else ())
    return _Region.apply(run, len(inputs), random, *inputs, *trained)  # pyright: ignore[reportReturnType]


class _Region(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, count: int, random: bool, *tensors: Tensor) -> Any:  # type: ignore[override]
        states = _states(tensors[0].device) if random else ()
        with _as_region():
            outputs = run(tensors[:count])
        ctx.run, ctx.count, ctx.states, ctx.total = run, count, len(states), len(tensors)
        ctx.autocast = _autocast(tensors[0].device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *states)
        return tuple(y.view_as(y) if any(y is t for t in tensors) else y for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        saved = ctx.saved_tensors
        tensors, states = saved[: ctx.total], saved[ctx.total :]
        needs = ctx.needs_input_grad[3:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(tensors[: ctx.count], needs, strict=False)]
        wanted = [t for t, need in zip((*inputs, *tensors[ctx.count :]), needs, strict=True) if need]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(ctx.autocast())
            stack.enter_context(_as_region())
            if states:
                stack.enter_context(_replay(states, tensors[0].device))
            outputs = ctx.run(inputs)
            pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
        found = iter(())
        if pairs and wanted:
            made, given = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(made, wanted, given, allow_unused=True))
        return (None, None, None, *(next(found, None) if need else None for need in needs))


@contextlib.contextmanager
def _as_region() -> Iterator[None]:
    token = _inside.set(True)
    try:
        with without_recompute():
            yield
    finally:
        _inside.reset(token)


def _states(device: torch.device) -> tuple[Tensor, ...]:
    """The random generators' states, that of the device behind that of the CPU."""
    own = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *own)


@contextlib.contextmanager
def _replay(states: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    now = _states(device)
    _set_states(states, device)
    try:
        yield
    finally:
        _set_states(now, device)


def _set_states(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _autocast(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A context with the autocast that is on now."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
