"""One sub-network trained by itself, as a run would, on the photographs to choose by."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from tinytl._prepared import eval_transform, train_transform
from tinytl.data import Loader, PhotoCache
from tinytl.engine import StepInfo, evaluate, fit
from tinytl.methods import adapt_, calibrate_, method
from tinytl.nn.packing import pack_frozen_
from tinytl.spec import FitOptions
from tinytl.trained import base_network

from .space import Choice
from .target import CACHE_BYTES, Target
from .tuning import CALIBRATION_PHOTOS


@dataclass(frozen=True)
class Trial:
    """What came of it: top-1 and loss on the held-out fifth, and the median of a step's seconds."""

    top1: float
    loss: float
    step_seconds: float


def try_out(choice: Choice, target: Target, weights: Path | None, epochs: int) -> Trial:
    """Train a sub-network for so many epochs on `target.tune`, and measure it on `target.held`.

    ``weights``: of its main network, where they are not the space's own.
    """
    spec = target.spec
    own = str(weights) if weights is not None else spec.weights
    pretrained = spec.pretrained or weights is not None
    backbone = base_network(choice.backbone, pretrained, spec.norm, own, len(target.classes), spec.seed)
    p = replace(backbone.preprocessing, resolution=choice.resolution)
    adaptation = adapt_(backbone.model, method(choice.method), resolution=choice.resolution, seed=spec.seed)
    if spec.frozen_bits < 32:
        pack_frozen_(backbone.model, spec.frozen_bits)
    if adaptation.inserted:
        images = target.calibration_images(choice.resolution, CALIBRATION_PHOTOS)
        calibrate_(backbone.model, adaptation, images)
    augment = train_transform(p, spec)
    plain = eval_transform(p)
    cache = PhotoCache(CACHE_BYTES)
    training = Loader(target.tune, augment, spec.batch_size, shuffle=True, seed=spec.seed, workers=1, cache=cache)
    held = Loader(target.held, plain, spec.batch_size, shuffle=False, workers=1)
    options = FitOptions(
        epochs=epochs,
        lr=spec.lr,
        label_smoothing=spec.label_smoothing,
        micro_batch=spec.micro_batch,
        optimizer_bits=spec.optimizer_bits,
        seed=spec.seed,
    )
    seconds: list[float] = []

    def note(info: StepInfo) -> None:
        seconds.append(info.seconds)

    fit(backbone.model, training, None, options, on_step=note)
    found = evaluate(backbone.model, held)
    return Trial(found.top1, found.loss, statistics.median(seconds))
