"""The training step that figures are taken of: which network, which images, how many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tinytl._options import number_of_bytes
from tinytl.backbones import load
from tinytl.data import Normalize
from tinytl.engine.optimizer import make_optimizer
from tinytl.errors import InputError
from tinytl.methods import Adaptation, adapt_, method
from tinytl.nn.packing import pack_frozen_
from tinytl.spec import FROZEN_BITS, FitOptions

NORMALIZE = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""In the place of a backbone's own."""


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
        frozen_bits: of the lean network's frozen weights: 32, or 16 or 8 (see ``tinytl.nn.packing``).
        codebook: with 8 of them, a table of 256 values a layer in place of a scale a channel.
        optimizer, optimizer_bits, update: as in ``tinytl.spec.FitOptions``.
        memory_budget: as in ``tinytl.spec.TrainSpec``; of the lean network's step.
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
    frozen_bits: int = 32
    codebook: bool = False
    optimizer: str = "adam"
    optimizer_bits: int = 32
    update: str = "end"
    memory_budget: int | str | None = None

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
        if self.frozen_bits not in FROZEN_BITS:
            raise InputError(f"frozen_bits is {self.frozen_bits}: expected one of {', '.join(map(str, FROZEN_BITS))}")
        if self.codebook and self.frozen_bits != 8:
            raise InputError(f"codebook with frozen_bits {self.frozen_bits}: a table of 256 values takes frozen_bits 8")
        if self.memory_budget is not None:
            number_of_bytes("memory_budget", self.memory_budget)
        FitOptions(optimizer=self.optimizer, optimizer_bits=self.optimizer_bits, update=self.update)

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
    if spec.lean and spec.frozen_bits < 32:
        pack_frozen_(model, spec.frozen_bits, spec.codebook)
    return model.train(), adaptation


def build_optimizer(spec: StepSpec, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a run with these options, over what trains among the parameters."""
    options = FitOptions(epochs=1, optimizer=spec.optimizer, optimizer_bits=spec.optimizer_bits)
    return make_optimizer([p for p in parameters if p.requires_grad], options)


def build_batch(spec: StepSpec, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Random images (N, 3, R, R) uint8, as a loader holds them, in that memory layout, and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, spec.shape(spec.batch_size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(spec.classes, (spec.batch_size,), generator=generator)
    return images.contiguous(memory_format=memory_format), labels


def trained_dtype(model: nn.Module) -> torch.dtype:
    """The type of what trains in `model`, which its input is made in; float32 where nothing does."""
    return next((p.dtype for p in model.parameters() if p.requires_grad), torch.float32)


def as_input(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The network's input (n, 3, R, R), of images held as bytes: by the numbers of no backbone, which change no byte.

    In the layout of `images`; other images are given back as they are.
    """
    if images.dtype != torch.uint8:
        return images
    made = NORMALIZE(images).to(dtype)
    return made.contiguous() if images.is_contiguous() else made


def pieces_of(
    images: Tensor, labels: Tensor, size: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch's micro-batches, ready for the network; each is made when its turn comes and not held here."""
    for some, target in zip(images.split(size), labels.split(size), strict=True):
        yield as_input(some, dtype), target
