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
from torch.autograd.graph import get_gradient_edge

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


def announce(name: str, inputs: Sequence[Tensor], states: Sequence[Tensor]) -> None:
    """Tell the observer, if there is one, what a region keeps."""
    observer = _observer.get()
    if observer is not None:
        observer(name, inputs, states)


def inside_region() -> bool:
    """Whether a region is running that those inside it are part of."""
    return _inside.get()


def region(
    run: Run,
    inputs: Sequence[Tensor],
    trained: Sequence[Tensor],
    *,
    random: bool = False,
    name: str = "",
    at_once: bool = True,
) -> tuple[Tensor, ...]:
    """`run(inputs)`, keeping only `inputs` for backward.

    Args:
        run: pure: from tensors to tensors, using `trained` beside them.
        inputs: what it is given.
        trained: all other tensors that it uses and that require a gradient.
        random: whether it draws random numbers.
        name: for the ledger.
        at_once: while it runs again, everything in it keeps what it likes: right for a stretch about as long as a
            block. False: what would run again by itself (a chain with a group norm, a region) does so in here too, so
            that only one of them has all its tensors alive at a time; those pass forward three times instead of twice.
    """
    announce(name, inputs, random_states(inputs[0].device) if random else ())
    return _Region.apply(run, len(inputs), random, at_once, *inputs, *trained)  # pyright: ignore[reportReturnType]


class _Region(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, count: int, random: bool, at_once: bool, *tensors: Tensor) -> Any:  # type: ignore[override]
        states = random_states(tensors[0].device) if random else ()
        with _as_region() if at_once else contextlib.nullcontext():
            outputs = run(tensors[:count])
        ctx.run, ctx.count, ctx.states, ctx.total, ctx.at_once = run, count, len(states), len(tensors), at_once
        ctx.autocast = autocast_now(tensors[0].device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *states)
        return tuple(y.view_as(y) if any(y is t for t in tensors) else y for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        saved = ctx.saved_tensors
        tensors, states = saved[: ctx.total], saved[ctx.total :]
        needs = ctx.needs_input_grad[4:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(tensors[: ctx.count], needs, strict=False)]
        wanted = [t for t, need in zip((*inputs, *tensors[ctx.count :]), needs, strict=True) if need]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(ctx.autocast())
            stack.enter_context(_as_region() if ctx.at_once else contextlib.nullcontext())
            if states:
                stack.enter_context(replayed(states, tensors[0].device))
            outputs = ctx.run(inputs)
        # of the outputs, which were there before, only the graph is needed
        pairs = [
            (get_gradient_edge(y), g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad
        ]
        del outputs
        found = iter(())
        if pairs and wanted:
            made, given = zip(*pairs, strict=True)
            del pairs
            found = iter(torch.autograd.grad(made, wanted, given, allow_unused=True))
        return (None, None, None, None, *(next(found, None) if need else None for need in needs))


@contextlib.contextmanager
def _as_region() -> Iterator[None]:
    token = _inside.set(True)
    try:
        with without_recompute():
            yield
    finally:
        _inside.reset(token)


def random_states(device: torch.device) -> tuple[Tensor, ...]:
    """The random generators' states, that of the device behind that of the CPU."""
    own = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *own)


@contextlib.contextmanager
def replayed(states: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Random numbers are drawn as they were from those states on; afterwards the generators stand where they stood."""
    now = random_states(device)
    _set_states(states, device)
    try:
        yield
    finally:
        _set_states(now, device)


def _set_states(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def autocast_now(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A context with the autocast that is on now."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
