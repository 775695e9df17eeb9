"""A network adapted only to be described: nothing in it is hashed, counted or held against other images."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tinytl.graph.capture import Captured, run_traced
from tinytl.graph.frame import Trace

from ._lowering import is_leaf
from ._prepare import prepare_
from .adaptation import lower_, plan_adaptation
from .method import Method


def lower_ghost_(
    model: nn.Module,
    method: Method,
    *,
    resolution: int,
    trace: Trace | None = None,
    on_prepared: Callable[[nn.Module], object] | None = None,
) -> None:
    """Adapt a throw-away network on the meta device, a fifth of `adapt_`'s work; its training step is the same.

    What `adapt_` also looks at is whether the network does the same for other images; that of a backbone of ours is
    known, and whoever trains what was described goes by way of `adapt_`.

    ``trace`` is `stock_trace` of an equal network at that resolution, where it was made before. ``on_prepared`` is
    shown the network in stock PyTorch: lite modules in, not yet lean. The network is left in training mode.

    Raises what `adapt_` raises, and leaves the network half changed then.
    """
    plan = plan_adaptation(model, method, resolution=resolution, trace=trace)
    prepare_(model, plan)
    if on_prepared is not None:
        on_prepared(model)
    prepared = run_traced(model.train(), resolution, is_leaf)  # not a copy: what a trace changes, it puts back
    lower_(model, Captured(prepared, prepared), plan)
