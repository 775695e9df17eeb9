"""What training tells: about a step, an epoch, a whole run."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch

from .evaluation import Evaluation


@dataclass(frozen=True)
class StepInfo:
    """One step.

    Attributes:
        epoch, batch, step: counted from 1; ``batches`` are an epoch's, ``steps`` the whole run's.
        loss, accuracy: mean over the batch's images, before the step; accuracy as a fraction.
        seconds, wait_seconds: taken by the step; waited for the loader before it.
        peak_bytes: see `peak_bytes`.
    """

    epoch: int
    batch: int
    batches: int
    step: int
    steps: int
    loss: float
    accuracy: float
    lr: float
    images: int
    seconds: float
    wait_seconds: float
    peak_bytes: int

    @property
    def images_per_second(self) -> float:
        """Images a second, waiting for the loader included."""
        return self.images / max(self.seconds + self.wait_seconds, 1e-9)


@dataclass(frozen=True, eq=False)
class EpochInfo:
    """One epoch.

    Attributes:
        epoch, step: counted from 1; ``epochs`` are the whole run's.
        loss, accuracy: means over the epoch's training images as they came (augmented, the weights changing).
        lr: of the last step.
        validation: None without a validation loader.
        best_top1, best_epoch: best validation accuracy so far; -1 and 0 without validation.
        trained_images, seconds, wait_seconds, validation_seconds: this process's share of the epoch, which is
            not the whole of an epoch that was resumed; seconds as in `StepInfo`.
        peak_bytes: see `peak_bytes`.
    """

    epoch: int
    epochs: int
    step: int
    loss: float
    accuracy: float
    lr: float
    validation: Evaluation | None
    best_top1: float
    best_epoch: int
    trained_images: int
    seconds: float
    wait_seconds: float
    validation_seconds: float
    peak_bytes: int

    @property
    def images_per_second(self) -> float:
        """Training images a second, waiting for the loader included."""
        return self.trained_images / max(self.seconds + self.wait_seconds, 1e-9)


@dataclass(frozen=True, eq=False)
class FitResult:
    """What `fit` did.

    ``epochs`` are those that ended in this process and ``validation`` is the last one's: () and None when the
    resumed run was finished already. The model is left with the last step's weights, in the mode that it had.
    """

    epochs: tuple[EpochInfo, ...]
    validation: Evaluation | None
    best_top1: float
    best_epoch: int
    steps: int
    seconds: float

    @property
    def step_share(self) -> float | None:
        """The share of the training time that the steps got, the rest being waited for the loader; None: no epoch."""
        stepped = sum(info.seconds for info in self.epochs)
        waited = sum(info.wait_seconds for info in self.epochs)
        return stepped / max(stepped + waited, 1e-9) if self.epochs else None


def peak_bytes(device: torch.device) -> int:
    """Return the most memory held so far: the allocator's on CUDA, else this process's resident set (RSS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS tells bytes, Linux KiB
