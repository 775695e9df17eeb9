"""The step that every contender takes: the network, its weights, the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinytl.backbones import load
from tinytl.engine import run_step
from tinytl.memory import StepSpec, training_step
from tinytl.memory.step import build_batch, pieces_of
from tinytl.methods import METHODS, Adaptation, LiteResidual, adapt_

LEARNING_RATE = 1e-4  # low: the same batch is trained on a hundred times, and numbers that overflow would tell nothing


@dataclass(frozen=True)
class Setting:
    """What is the same for all.

    Attributes:
        backbone: a key of ``tinytl.backbones.BACKBONES``.
        pretrained: with its ImageNet weights; else with random ones.
        resolution: pixels a side.
        batch_size: images a step.
        classes: outputs of the classifier.
        double: in float64, the same values.
    """

    backbone: str = "proxylessnas_mobile"
    pretrained: bool = False
    resolution: int = 224
    batch_size: int = 8
    classes: int = 102
    double: bool = False

    def batch(self, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
        """Random images (N, 3, R, R) in that layout, as bytes, and labels (N,)."""
        spec = StepSpec(
            self.backbone, "ft-last", resolution=self.resolution, batch_size=self.batch_size, classes=self.classes
        )
        return build_batch(spec, memory_format)


def network(setting: Setting, method: str, *, lean: bool) -> tuple[nn.Module, Adaptation]:
    """The adapted network, in training mode; its tensors are the same for equal arguments, lean or not.

    Parameters that start at 0 (biases, the last scale of a lite residual module) are drawn, since gradients that are
    mostly 0 would compare equal whatever computes them. Dropout is off: each way to run a network draws its own masks.
    """
    chosen = METHODS[method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lite = chosen.part(LiteResidual) is not None
        model = load(setting.backbone, pretrained=setting.pretrained, lite=lite, num_classes=setting.classes).model
    leave_zero_(model)
    if setting.double:
        model.double()
    adaptation = adapt_(model, chosen, resolution=setting.resolution, lean=lean)
    return ready_to_train(model), adaptation


def leave_zero_(model: nn.Module) -> None:
    """Draw every parameter that is all 0 and trains."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def ready_to_train(model: nn.Module) -> nn.Module:
    """In training mode, dropout aside."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return model


@dataclass(frozen=True)
class Ready:
    """A contender that is ready to take the step.

    Attributes:
        model: what is called on the images.
        trained: what trains, by its name in the network before it was made lean.
        optimizer: of these.
        images, labels: of the step.
        micro_batch: images at a time; None: all.
        update: 'end', or 'backward': each parameter as soon as its gradient is complete.
    """

    model: nn.Module
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    micro_batch: int | None = None
    update: str = "end"

    def step(self) -> Callable[[], None]:
        """The whole step."""
        return training_step(self.model, self.images, self.labels, self.optimizer, self.micro_batch, update=self.update)

    def gradients(self) -> dict[str, Tensor]:
        """What the step's backward pass leaves, by name, before any update."""
        dtype = next(iter(self.trained.values())).dtype
        size = self.micro_batch or len(self.images)
        run_step(self.model, None, pieces_of(self.images, self.labels, size, dtype), len(self.labels))
        found = {name: p.grad.clone() for name, p in self.trained.items() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return found


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains in a stock network, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
