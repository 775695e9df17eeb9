"""Where a NaN or an infinity comes from, asked once one has been seen.

Seeing one is cheap: the loss is one number, and the largest gradient is one pass over what trains. Finding its origin
costs a forward pass with a hook on every module, and is done only then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def origin(model: nn.Module, batches: Iterable[Tensor]) -> str:
    """Say where ``model`` first comes to NaN or infinity on the images (N, 3, H, W) of ``batches``, in order.

    In forward order: the images, a parameter or buffer, the first layer with such an output. A layer is the innermost
    module that runs as one: of a lean block, the block.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not _is_finite(tensor):
            return f"{name} holds {_kind(tensor)}"
    device = next(model.parameters()).device
    for images in batches:
        if not _is_finite(images):
            return f"the input images hold {_kind(images)}"
        layer = _first_layer(model, images.to(device))
        if layer:
            return layer
        del images  # not alive while the next are made
    return "every layer's output is finite when the pass is repeated, so it is the loss that overflows"


def bad_gradient(model: nn.Module) -> str | None:
    """Name a gradient that no optimizer can take a step with; None: there is none.

    NaN and infinity, and what is so large (1.8e19) that Adam's average of squares would be infinite in float32. Of
    several it is the last in the order of the parameters, which is nearest to the loss: backward came there first.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # one number to fetch from the device; NaN wins every maximum
    if _fits(torch.nn.utils.get_total_norm(gradients, math.inf)):
        return None
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    name, gradient = next((n, g) for n, g in reversed(named) if not _fits(torch.linalg.vector_norm(g, math.inf)))
    return f"the gradient of {name} {_fault(gradient)}"


def bad_gradient_of(gradient: Tensor) -> str | None:
    """Say what is wrong with one gradient ('holds NaN'), by the same rule; None: nothing."""
    return None if _fits(torch.linalg.vector_norm(gradient, math.inf)) else _fault(gradient)


def _fits(largest: Tensor) -> bool:
    return math.isfinite(largest.float().square().item())


def _fault(gradient: Tensor) -> str:
    if not _is_finite(gradient):
        return f"holds {_kind(gradient)}"
    return f"holds {gradient.abs().max().item():.2g}, too large to square"


def _first_layer(model: nn.Module, images: Tensor) -> str | None:
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not found and not _is_finite(output):
            layer = f"{names[module] or 'the whole network'} ({type(module).__name__})"
            came = "finite" if _is_finite(args) else "not finite: what stands before it in the code is no layer"
            found.append(f"the first bad layer is {layer}, its input was {came}")

    handles = [module.register_forward_hook(look) for module in names]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _is_finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(value) if tensor.is_floating_point())


def _kind(tensor: Tensor) -> str:
    return "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
