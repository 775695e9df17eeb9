"""What a sub-network costs, without running it: the planner's bytes, and multiply-adds.

The network is made without memory (PyTorch's meta device), adapted, and its step described operator by operator, as for
any plan (`tinytl.memory.planner`). Nothing is estimated from other networks. A search plans hundreds of sub-networks,
so what many of them have in common is made once: the stock network of a backbone, and its trace at a resolution.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from tinytl._prepared import beside_bytes
from tinytl.backbones import block_paths, complexity, find
from tinytl.engine.optimizer import make_optimizer
from tinytl.graph.frame import Trace
from tinytl.memory.capture import no_collector
from tinytl.memory.planner import plan_step
from tinytl.methods import lower_ghost_, method, stock_trace
from tinytl.nn.meta import meta_copy, on_meta
from tinytl.nn.packing import pack_frozen_
from tinytl.spec import FitOptions

from .space import Choice


@dataclass(frozen=True)
class Cost:
    """What a training step of a sub-network takes.

    Attributes:
        memory_bytes: most bytes alive at once, as planned.
        multiply_adds: of one image's forward pass, lite modules included; None where nobody asked.
        trained_elements: values that train.
    """

    memory_bytes: int
    multiply_adds: int | None
    trained_elements: int

    def to_json(self) -> dict[str, int | None]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Conditions:
    """How the sub-networks will be trained, as far as their cost depends on it.

    Attributes:
        classes: of the classifier.
        norm: 'bn' or 'gn'.
        batch_size, micro_batch: images a step, and images at a time (None: all).
        frozen_bits, optimizer_bits: as in `tinytl.spec`.
        multiply_adds: whether they are counted too, which takes as long as the rest.
    """

    classes: int
    norm: str = "bn"
    batch_size: int = 8
    micro_batch: int | None = None
    frozen_bits: int = 32
    optimizer_bits: int = 32
    multiply_adds: bool = False


def cost_of(choice: Choice, conditions: Conditions) -> Cost:
    """Plan a step of a sub-network, at the fastest way of taking it.

    The same choice costs the same, whatever was planned before it.

    Raises:
        InputError: a choice that no network can be made of.
    """
    # a collection walks through all that PyTorch is, and takes longer than a plan; the network that is made here is a
    # cycle, and dead before the next one
    with no_collector():
        return _cost_of(choice, conditions)


def _cost_of(choice: Choice, conditions: Conditions) -> Cost:
    resolution, batch = choice.resolution, conditions.batch_size
    stock = choice.backbone, conditions.norm, conditions.classes
    model = meta_copy(_stock(*stock))
    counted: list[int] = []
    lower_ghost_(
        model,
        method(choice.method),
        resolution=resolution,
        trace=_trace(*stock, resolution),
        on_prepared=(lambda stock: counted.append(complexity(stock, resolution).multiply_adds))
        if conditions.multiply_adds
        else None,
    )
    if conditions.frozen_bits < 32:
        pack_frozen_(model, conditions.frozen_bits)
    fit = FitOptions(epochs=1, optimizer_bits=conditions.optimizer_bits)

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer([p for p in parameters if p.requires_grad], fit)

    planned = plan_step(
        model,
        (batch, 3, resolution, resolution),
        blocks=block_paths(model),
        optimizer=optimizer,
        micro_batch=conditions.micro_batch,
        beside_bytes=beside_bytes(batch, resolution),
        throw_away=True,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(planned.peak_bytes, counted[0] if counted else None, trained)


@functools.lru_cache(maxsize=64)  # a quarter of a megabyte each
def _stock(backbone: str, norm: str, classes: int) -> nn.Module:
    """The network without memory, in evaluation mode; never changed, only copied."""
    with on_meta():
        return find(backbone).build(norm=norm, num_classes=classes).eval()


@functools.lru_cache(maxsize=128)
def _trace(backbone: str, norm: str, classes: int, resolution: int) -> Trace:
    """Of `_stock`; never changed. Raises InputError for images that are too small for it."""
    return stock_trace(_stock(backbone, norm, classes), resolution)
