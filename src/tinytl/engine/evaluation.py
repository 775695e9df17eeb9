"""How good a network is on a set of photographs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.errors import InputError

from .batches import BatchSource, closing, pieces


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good a model is on a set of images.

    Attributes:
        top1: share of the images whose largest logit is the label's, in [0, 1].
        balanced_accuracy: mean recall of the classes that are present, in [0, 1].
        images: how many there were.
        loss: mean cross entropy without label smoothing, in nats.
        confusion: (C, C) int64; row: true class, column: predicted class.
        majority_share: share of the most frequent true class: the top-1 of always answering that.
    """

    top1: float
    balanced_accuracy: float
    images: int
    loss: float
    confusion: Tensor = field(repr=False)
    majority_share: float


def evaluate(model: nn.Module, loader: BatchSource, *, micro_batch: int | None = None) -> Evaluation:
    """Measure a model on the batches of ``loader.epoch(0)``, in evaluation mode, which is undone afterwards.

    ``micro_batch`` bounds the images put through the model at once. Raises InputError when there is no image.
    """
    device = next(model.parameters()).device
    modes = module_modes(model)
    model.eval()
    guessed: list[Tensor] = []
    actual: list[Tensor] = []
    loss_sum, classes = 0.0, 0
    try:
        with torch.inference_mode(), closing(loader.epoch(0)) as source:
            for batch in source:
                size = micro_batch or len(batch.labels)
                for images, labels in pieces(batch, size):
                    logits = model(images.to(device, non_blocking=True))  # (n, classes)
                    del images  # not alive while the next are made
                    classes = logits.shape[1]
                    loss_sum += F.cross_entropy(logits, labels.to(device), reduction="sum").item()
                    guessed.append(logits.argmax(1).cpu())
                    actual.append(labels.cpu())
    finally:
        restore_modes(modes)
    if not actual:
        raise InputError("there is no image to evaluate on: the loader is empty")
    pairs = torch.cat(actual) * classes + torch.cat(guessed)
    confusion = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    support = confusion.sum(1)  # images of each class
    right = confusion.diagonal()
    images = int(support.sum())
    return Evaluation(
        top1=int(right.sum()) / images,
        balanced_accuracy=(right[support > 0].double() / support[support > 0]).mean().item(),
        images=images,
        loss=loss_sum / images,
        confusion=confusion,
        majority_share=int(support.max()) / images,
    )


def module_modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Which modules are in training mode: each for itself, since a user may have frozen some."""
    return [(module, module.training) for module in model.modules()]


def restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Put every module back into the mode that it had."""
    for module, training in modes:
        module.training = training
