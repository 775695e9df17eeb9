"""What is asked of a run: what its result depends on (`TrainSpec`), and how it is carried out (`RunOptions`).

The command line's options and the keys of a ``--config`` file have the same names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tinytl.backbones import BACKBONES
from tinytl.engine import FitOptions
from tinytl.errors import InputError, UnknownNameError
from tinytl.methods import method

SMALLEST_RESOLUTION = 32


@dataclass(frozen=True)
class TrainSpec:
    """All that a run's result depends on, but for the order of float sums, which the number of threads may change.

    The command line's options have the same names.

    Attributes:
        photos: a folder ROOT/CLASS/*.jpg, one with train/ and val/ in it, or the name of a data set.
        backbone, norm, weights, pretrained: as for `tinytl.backbones.load`.
        method, last_blocks: as for `tinytl.methods.method`.
        resolution: pixels a side; None: the backbone's own.
        batch_size: images a step.
        val_fraction: share of each class held out for validation, unless the folder has its own split.
        split_seed: of the choice of what is held out; not the run's seed, so that runs of several seeds are
            compared on the same photographs.
        min_scale: smallest share of a photograph's area that a training crop takes (the paper: 0.22).
        flip, color: mirror training images; distort their brightness and saturation.
        calibrate: measure the statistics of fresh lite modules on training images before training.
        fit: how to train; its seed is the run's seed.
    """

    photos: str
    backbone: str = "efficientnet_lite0"
    method: str = "tinytl-l+b"
    last_blocks: int = 0
    norm: str = "bn"
    weights: str | None = None
    pretrained: bool = True
    resolution: int | None = None
    batch_size: int = 8
    val_fraction: float = 0.2
    split_seed: int = 0
    min_scale: float = 0.22
    flip: bool = True
    color: bool = False
    calibrate: bool = True
    fit: FitOptions = dataclasses.field(default_factory=FitOptions)

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise UnknownNameError("backbone", self.backbone, BACKBONES)
        method(self.method, last_blocks=self.last_blocks)
        if self.resolution is not None and self.resolution < SMALLEST_RESOLUTION:
            raise InputError(f"resolution {self.resolution}: expected {SMALLEST_RESOLUTION} pixels or more")
        if self.batch_size < 1:
            raise InputError(f"batch size {self.batch_size}: expected 1 or more")
        if not 0.0 < self.val_fraction < 1.0:
            raise InputError(f"validation fraction {self.val_fraction}: expected more than 0 and less than 1")
        if not 0.0 < self.min_scale <= 1.0:
            raise InputError(f"smallest crop scale {self.min_scale}: expected more than 0 and at most 1")


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out: nothing here changes what is learned, and a resumed run may choose anew.

    Attributes:
        workers: threads that decode photographs; 0 decodes in the training thread.
        threads: threads that compute; None: as many as PyTorch takes.
        checkpoint_steps, checkpoint_seconds: a checkpoint every so many steps, or so many seconds, whichever comes
            first, beside the one at each epoch's end; None: not by that measure.
        cache_bytes: most bytes of decoded photographs to hold in memory; 0 holds none.
        strict: refuse photographs that cannot be read, instead of training without them.
        tensorboard: also write event files into the run's folder.
    """

    workers: int = 2
    threads: int | None = None
    checkpoint_steps: int | None = None
    checkpoint_seconds: float | None = 60.0
    cache_bytes: int = 0
    strict: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("workers", self.workers, 0),
            ("threads", self.threads, 1),
            ("checkpoint_steps", self.checkpoint_steps, 1),
            ("cache_bytes", self.cache_bytes, 0),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} is {value}: expected {least} or more")
        if self.checkpoint_seconds is not None and not self.checkpoint_seconds > 0:
            raise InputError(f"checkpoint_seconds is {self.checkpoint_seconds}: expected more than 0")
