"""A network adapted only to be described: nothing in it is hashed, counted or kept."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tinytl.graph.capture import capture
from tinytl.nn.kept import meta_copy

from ._lowering import is_leaf
from ._prepare import prepare_
from .adaptation import lower_, plan_adaptation
from .method import Method


def lower_ghost_(
    model: nn.Module,
    method: Method,
    *,
    resolution: int,
    on_prepared: Callable[[nn.Module], object] | None = None,
) -> None:
    """Adapt a throw-away network on the meta device, a third of `adapt_`'s work; the step made of it is the same.

    ``on_prepared`` is shown the network in stock PyTorch: lite modules in, not yet lean.

    Raises what `adapt_` raises, and leaves the network half changed then.
    """
    plan = plan_adaptation(model, method, resolution=resolution)
    prepare_(model, plan)
    if on_prepared is not None:
        on_prepared(model)
    lower_(model, capture(meta_copy(model), resolution, is_leaf), plan)
