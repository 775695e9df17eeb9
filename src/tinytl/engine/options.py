"""How to train: the options of a run, refused where they cannot be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinytl.errors import InputError, UnknownNameError

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class FitOptions:
    """How to train. Bad values are refused with an InputError.

    Attributes:
        epochs: passes over the training images.
        lr: peak learning rate; the paper's, tuned per data set at batch 8, run from 0.5e-4 to 16e-4.
        weight_decay: added to the gradient as ``weight_decay * parameter``.
        label_smoothing: the paper takes 0.7, and 0.1 for CIFAR and Food.
        micro_batch: most images whose activations are alive at once, in validation too; None: a whole batch.
        optimizer: 'adam' or 'sgd'.
        momentum: of SGD; Adam has its own.
        seed: of every random draw in the model.
        warmup_epochs: epochs over which the rate rises linearly from 0; they count among ``epochs``.
    """

    epochs: int = 50
    lr: float = 6e-4
    weight_decay: float = 0.0
    label_smoothing: float = 0.1
    micro_batch: int | None = None
    optimizer: str = "adam"
    momentum: float = 0.9
    seed: int = 0
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        _whole("epochs", self.epochs, 1)
        _whole("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise InputError(f"seed is {self.seed}, expected less than 2**63")
        _whole("warmup_epochs", self.warmup_epochs, 0)
        if self.micro_batch is not None:
            _whole("micro_batch", self.micro_batch, 1)
        _number("lr", self.lr)
        if self.lr == 0:
            raise InputError("lr is 0: nothing would be learned; the default is 6e-4")
        _number("weight_decay", self.weight_decay)
        _number("label_smoothing", self.label_smoothing, below=1.0)
        _number("momentum", self.momentum, below=1.0)
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", str(self.optimizer), OPTIMIZERS)
        if self.warmup_epochs >= self.epochs:
            raise InputError(f"warmup_epochs is {self.warmup_epochs}, expected fewer than the {self.epochs} epochs")


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}, expected a whole number of at least {least}")


def _number(name: str, value: object, below: float = math.inf) -> None:
    # NaN and infinity fail the comparison too
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        end = "" if below == math.inf else f" and below {below:g}"
        raise InputError(f"{name} is {value!r}, expected a number of at least 0{end}")
