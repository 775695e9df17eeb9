"""The training step that figures are taken of: which network, which images, how many at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tinytl.backbones import load
from tinytl.errors import InputError
from tinytl.methods import Adaptation, adapt_, method


@dataclass(frozen=True)
class StepSpec:
    """The training step that a worker builds and takes.

    Attributes:
        backbone: a key of ``tinytl.backbones.BACKBONES``; its weights are random, which no byte depends on.
        method: a method's name on the command line, e.g. 'tinytl-l+b'.
        norm: 'bn' or 'gn'.
        resolution: pixels a side.
        batch_size, micro_batch: images a step, and images at a time (None: all).
        classes: outputs of the classifier.
        last_blocks: blocks at the end that train in full.
        lean: the lean network, or stock PyTorch's of the same method.
        threads: PyTorch's threads; None leaves its choice.
    """

    backbone: str
    method: str
    norm: Literal["bn", "gn"] = "bn"
    resolution: int = 224
    batch_size: int = 8
    micro_batch: int | None = None
    classes: int = 102
    last_blocks: int = 0
    lean: bool = True
    threads: int | None = None

    def check(self) -> None:
        """Refuse numbers that cannot be (InputError); names are refused where they are looked up."""
        smallest = {"resolution": 32, "batch_size": 1, "classes": 1, "last_blocks": 0}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: expected {least} or more")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise InputError(f"micro_batch is {self.micro_batch}: expected 1 or more")
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise InputError(f"micro_batch is {self.micro_batch}: expected at most the batch_size, {self.batch_size}")
        if self.last_blocks and self.method == "ft-full":
            raise InputError(f"last_blocks is {self.last_blocks}: 'ft-full' trains every block, leave one of them out")

    def shape(self, images: int) -> tuple[int, int, int, int]:
        """Shape of so many input images."""
        return images, 3, self.resolution, self.resolution


def build_network(spec: StepSpec) -> tuple[nn.Module, Adaptation]:
    """The adapted network with random weights, equal for equal specs, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load(spec.backbone, pretrained=False, norm=spec.norm, num_classes=spec.classes).model
    chosen = method(spec.method, last_blocks=spec.last_blocks)
    adaptation = adapt_(model, chosen, resolution=spec.resolution, lean=spec.lean)
    return model.train(), adaptation


def build_batch(spec: StepSpec, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Random images (N, 3, R, R) in that memory layout, and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(spec.shape(spec.batch_size), generator=generator)
    labels = torch.randint(spec.classes, (spec.batch_size,), generator=generator)
    return images.contiguous(memory_format=memory_format), labels
