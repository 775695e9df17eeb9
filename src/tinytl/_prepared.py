"""Everything that a run makes before its first step: photographs that can be read, the adapted network, loaders."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from tinytl._interrupt import Stop
from tinytl._options import number_of_bytes
from tinytl.backbones import Backbone, Preprocessing, find
from tinytl.data import (
    Batch,
    EvalTransform,
    Loader,
    PhotoCache,
    PhotoSet,
    TrainTransform,
    resolve_split,
)
from tinytl.delta import check_names
from tinytl.engine.batches import images_of
from tinytl.engine.optimizer import make_optimizer
from tinytl.memory.planner import Planned, plan_step
from tinytl.methods import Adaptation, adapt_, calibrate_, method
from tinytl.nn.execution import set_execution_
from tinytl.nn.packing import pack_frozen_
from tinytl.spec import FitOptions, RunOptions, TrainSpec
from tinytl.trained import base_network

CALIBRATION_BATCHES = 8
GENERATOR_BYTES = 5056
"""State of PyTorch's random generator, which is put aside while a run draws."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that is made before the first step."""

    spec: TrainSpec
    train: PhotoSet
    validation: PhotoSet
    backbone: Backbone
    adaptation: Adaptation
    preprocessing: Preprocessing
    planned: Planned | None = None  # how each step is taken, where a memory budget was given

    @property
    def fit(self) -> FitOptions:
        """How to train: as asked for, and as planned."""
        if self.planned is None:
            return self.spec.fit
        plan = self.planned.plan
        return replace(self.spec.fit, micro_batch=plan.micro_batch, update=plan.update)

    @property
    def model(self) -> nn.Module:
        """The adapted network."""
        return self.backbone.model


def prepare(
    spec: TrainSpec,
    options: RunOptions | None = None,
    on_check: Callable[[int, int], object] | None = None,
) -> Prepared:
    """See which photographs can be read, load the backbone and adapt it.

    ``on_check`` is told how many photographs have been read, and how many there are.

    Raises:
        InputError: anything in `spec` that cannot be used, or photographs that cannot be read if they must be.
    """
    options = options or RunOptions()
    train, validation = resolve_split(
        spec.photos,
        spec.val_fraction,
        spec.split_seed,
        strict=options.strict,
        workers=options.workers,
        on_progress=on_check,
    )
    known = find(spec.backbone).preprocessing
    preprocessing = replace(known, resolution=spec.resolution or known.resolution)
    check_names(train.classes, dataclasses.asdict(preprocessing))
    backbone = base_network(spec.backbone, spec.pretrained, spec.norm, spec.weights, len(train.classes), spec.fit.seed)
    chosen = method(spec.method, last_blocks=spec.last_blocks)
    adaptation = adapt_(backbone.model, chosen, resolution=preprocessing.resolution, seed=spec.fit.seed)
    if spec.frozen_bits < 32:
        pack_frozen_(backbone.model, spec.frozen_bits, spec.codebook)
    planned = _plan(spec, backbone.model, adaptation, preprocessing.resolution)
    return Prepared(spec, train, validation, backbone, adaptation, preprocessing, planned)


def beside_bytes(images: int, resolution: int) -> int:
    """What is alive beside a step: a batch that is read ahead (images, labels and indices), the generator's state."""
    return images * (3 * resolution**2 + 2 * 8) + GENERATOR_BYTES


def _plan(spec: TrainSpec, model: nn.Module, adaptation: Adaptation, resolution: int) -> Planned | None:
    """Choose how to take a step within the budget, if there is one, and have the network run so."""
    if spec.memory_budget is None:
        return None
    planned = plan_step(
        model,
        (spec.batch_size, 3, resolution, resolution),
        blocks=adaptation.blocks,
        budget_bytes=number_of_bytes("memory_budget", spec.memory_budget),
        optimizer=lambda parameters: make_optimizer(parameters, spec.fit),
        micro_batch=spec.fit.micro_batch,
        update=None if spec.fit.update == "end" else spec.fit.update,
        label_smoothing=spec.fit.label_smoothing,
        beside_bytes=beside_bytes(spec.batch_size, resolution),
    )
    set_execution_(model, planned.plan.policies)
    return planned


class Augments(Protocol):
    """What a specification says of training images: the smallest crop, mirroring, colours."""

    @property
    def min_scale(self) -> float: ...
    @property
    def flip(self) -> bool: ...
    @property
    def color(self) -> bool: ...


def train_transform(p: Preprocessing, how: Augments) -> TrainTransform:
    """How a photograph to learn from becomes a network's input."""
    return TrainTransform(
        p.resolution,
        p.mean,
        p.std,
        scale=(how.min_scale, 1.0),
        flip=how.flip,
        color=how.color,
        interpolation=p.interpolation,
    )


def eval_transform(p: Preprocessing) -> EvalTransform:
    """How a photograph to be judged by becomes a network's input."""
    return EvalTransform(p.resolution, p.mean, p.std, p.crop_fraction, p.interpolation)


@dataclass(frozen=True)
class StoppableLoader:
    """A loader that asks, between batches, whether a signal wants the run to stop."""

    loader: Loader
    stop: Stop

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start_batch: int = 0) -> Generator[Batch, None, None]:
        """As the loader's own."""
        return self.stop.between(self.loader.epoch(epoch, start_batch))


def loaders(
    prepared: Prepared, workers: int, cache: PhotoCache | None, stop: Stop
) -> tuple[StoppableLoader, StoppableLoader]:
    """The training and the validation photographs in batches; both are read by way of the cache, if there is one."""
    spec, p = prepared.spec, prepared.preprocessing
    augment = train_transform(p, spec)
    plain = eval_transform(p)
    size, seed = spec.batch_size, spec.fit.seed
    ahead = 1 if prepared.planned is not None else 2  # batches; within a budget one, which the plan counts
    training = Loader(
        prepared.train, augment, size, shuffle=True, seed=seed, workers=workers, cache=cache, prefetch=ahead
    )
    validation = Loader(prepared.validation, plain, size, shuffle=False, workers=workers, cache=cache, prefetch=ahead)
    return StoppableLoader(training, stop), StoppableLoader(validation, stop)


@dataclass(frozen=True)
class _FirstImages:
    """The first batches of training images, in pieces of a micro-batch; decoded anew for each pass over them."""

    loader: StoppableLoader
    size: int

    def __iter__(self) -> Iterator[Tensor]:
        with contextlib.closing(self.loader.epoch(0)) as batches:
            for _, batch in zip(range(CALIBRATION_BATCHES), batches, strict=False):
                yield from images_of(batch, self.size)


def calibrate(prepared: Prepared, loader: StoppableLoader) -> None:
    """Measure the statistics of fresh lite modules on the first training images, if there are any."""
    if prepared.adaptation.inserted:
        size = prepared.fit.micro_batch or prepared.spec.batch_size
        calibrate_(prepared.model, prepared.adaptation, _FirstImages(loader, size))


def settings_of(prepared: Prepared) -> dict[str, Any]:
    """What a run's bits depend on, as plain data: the specification, and which photographs there were."""
    settings = dataclasses.asdict(prepared.spec)
    settings["resolution"] = prepared.preprocessing.resolution
    settings["train_photos"] = prepared.train.fingerprint()
    settings["validation_photos"] = prepared.validation.fingerprint()
    settings["classes"] = list(prepared.train.classes)
    return settings
