"""Parameters updated in backward, each as soon as its gradient is complete.

The gradient is freed then, so that all of them together are never in memory: only those of one layer (of one chain,
where layers run as one). It is the same update to the bit as at the end of the step, since an optimizer's arithmetic
knows one parameter at a time; and nothing that comes later in backward reads the old value, since autograd calls a
gradient complete when everything that used the parameter in the forward pass has been gone back through.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tinytl.errors import InputError

from .optimizer import match_strides


@contextlib.contextmanager
def updates_in_backward(
    optimizer: torch.optim.Optimizer, before: Callable[[Tensor], object] | None = None
) -> Iterator[None]:
    """Within the block, have ``backward()`` update the optimizer's parameters, and drop their gradients.

    ``before`` is called with each parameter just before its update, and may raise. A parameter that is used in several
    places gets the sum of its gradients, and one update. Raises InputError, from ``backward()``, where the gradient
    comes in several parts, as from a second ``backward()`` (micro-batches) or one inside the first
    (``torch.utils.checkpoint`` with ``use_reentrant=True``): the parameter was updated with the first part then.
    """
    updated: set[Tensor] = set()

    def update(group: dict[str, Any], parameter: Tensor) -> None:
        if parameter in updated:
            raise InputError(
                f"a parameter {tuple(parameter.shape)} got its gradient in several parts, and was updated with the "
                "first: with update 'backward' it must come at once; take update 'end'"
            )
        match_strides(parameter)
        if before is not None:
            before(parameter)
        updated.add(parameter)
        groups = optimizer.param_groups
        optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(functools.partial(update, group))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
