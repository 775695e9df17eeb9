"""How a program is trained: what it was compiled with, and what is asked for instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from tinytl.errors import InputError


class Settings(NamedTuple):
    """What a run's result depends on beside the program and the photographs.

    Optimizer, weight decay, label smoothing and batch size are not among them: they are compiled into the program.

    Attributes:
        epochs: passes over the training photographs.
        lr: peak learning rate of the cosine.
        warmup_epochs: epochs of linear warm-up; they count among the epochs.
        seed: of every random draw.
        val_fraction: share of each class held out, unless the folder has its own split.
        split_seed: of the choice of what is held out.
        min_scale: smallest share of a photograph's area in a training crop.
        flip: mirror training images at random.
        color: distort brightness and saturation of training images.
    """

    epochs: int = 50
    lr: float = 6e-4
    warmup_epochs: int = 0
    seed: int = 0
    val_fraction: float = 0.2
    split_seed: int = 0
    min_scale: float = 0.22
    flip: bool = True
    color: bool = False


OF_FIT = (
    *("epochs", "lr", "weight_decay", "label_smoothing", "micro_batch", "optimizer", "momentum", "optimizer_bits"),
    *("update", "seed", "warmup_epochs"),
)
"""Names that a run of the lab writes down as of its `FitOptions`."""


def recorded(train: Mapping[str, Any], chosen: Settings) -> dict[str, Any]:
    """What the run was asked for, in the form that a run of the lab writes into run.json."""
    values = {**train, **chosen._asdict()}
    fit = {name: values.pop(name) for name in OF_FIT if name in values}
    return {**values, "engine": "device", "fit": fit}


def settings(train: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """What is given wins over what the program was compiled with (`train` of its META), that over the lab's defaults.

    Raises:
        InputError: a value that cannot be.
    """
    chosen = {name: train[name] for name in Settings._fields if train.get(name) is not None}
    found = Settings(**{**chosen, **given})
    whole = {"epochs": 1, "warmup_epochs": 0, "seed": 0, "split_seed": 0}
    for name, least in whole.items():
        value = getattr(found, name)
        if type(value) is not int or not least <= value < 2**63:
            raise InputError(f"{name} is {value!r}, expected a whole number of at least {least}")
    for name, above, most in (("lr", 0.0, math.inf), ("val_fraction", 0.0, 1.0), ("min_scale", 0.0, 1.0)):
        value = getattr(found, name)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and above < value <= most
        if not fits or value == math.inf or (name == "val_fraction" and value == 1):
            bound = "" if most == math.inf else " and below 1" if name == "val_fraction" else " and at most 1"
            raise InputError(f"{name} is {value!r}, expected a number above 0{bound}")
    if found.warmup_epochs >= found.epochs:
        raise InputError(f"warmup_epochs is {found.warmup_epochs}, expected fewer than the {found.epochs} epochs")
    return found
