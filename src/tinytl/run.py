"""A run: photographs and a specification in, a folder with what was learned out.

The folder holds `run.json` (the specification), `metrics.jsonl`, `checkpoint.safetensors`, and at the end
`delta.safetensors` and `curves.png`. `tinytl.trained.open_run` opens it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tinytl.backbones import BACKBONES, Backbone, Preprocessing
from tinytl.checkpoint import Boundary, Checkpointer
from tinytl.data import (
    EvalTransform,
    Loader,
    PhotoSet,
    TrainTransform,
    resolve_split,
)
from tinytl.delta import check_names, save_delta
from tinytl.engine import EpochInfo, Evaluation, FitResult, StepInfo, evaluate, fit
from tinytl.errors import RunError
from tinytl.methods import Adaptation, adapt_, calibrate_, method
from tinytl.report import MetricsLog, TensorBoardLog, plot_curves, require_tensorboard
from tinytl.spec import RunOptions, TrainSpec

from ._atomic import write_bytes
from .trained import base_network

CALIBRATION_BATCHES = 8


@dataclass(frozen=True)
class Callbacks:
    """What a run tells while it goes: each is called with one value, and may be left out."""

    on_start: Callable[[Prepared], object] | None = None
    on_step: Callable[[StepInfo], object] | None = None
    on_epoch: Callable[[EpochInfo], object] | None = None
    on_notice: Callable[[str], object] | None = None


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that is made before the first step."""

    spec: TrainSpec
    train: PhotoSet
    validation: PhotoSet
    backbone: Backbone
    adaptation: Adaptation
    preprocessing: Preprocessing

    @property
    def model(self) -> nn.Module:
        """The adapted network."""
        return self.backbone.model


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run left behind."""

    out: Path
    prepared: Prepared
    fit: FitResult
    evaluation: Evaluation
    delta_bytes: int


def prepare(spec: TrainSpec) -> Prepared:
    """Read the photographs' names, load the backbone and adapt it.

    Raises:
        InputError: anything in `spec` that cannot be used.
    """
    train, validation = resolve_split(spec.photos, spec.val_fraction, spec.split_seed)
    known = BACKBONES[spec.backbone].preprocessing
    preprocessing = replace(known, resolution=spec.resolution or known.resolution)
    check_names(train.classes, dataclasses.asdict(preprocessing))
    backbone = base_network(spec.backbone, spec.pretrained, spec.norm, spec.weights, len(train.classes), spec.fit.seed)
    chosen = method(spec.method, last_blocks=spec.last_blocks)
    adaptation = adapt_(backbone.model, chosen, resolution=preprocessing.resolution, seed=spec.fit.seed)
    return Prepared(spec, train, validation, backbone, adaptation, preprocessing)


def train(
    spec: TrainSpec,
    out: Path,
    *,
    options: RunOptions | None = None,
    resume: bool = False,
    callbacks: Callbacks | None = None,
) -> RunResult:
    """Train as `spec` says and leave the run in the folder `out`.

    Args:
        spec: what to train on, and how.
        out: made if missing; refused if it holds a run already, unless `resume`.
        options: how to carry it out; the result does not depend on it.
        resume: go on from the folder's checkpoint; a finished run is only evaluated again.
        callbacks: what to tell while it goes.

    Raises:
        InputError: something in `spec` or `out` cannot be used; RunError: the loss is not finite, or the folder
            cannot be written or resumed.
    """
    options, callbacks = options or RunOptions(), callbacks or Callbacks()
    tell = callbacks.on_notice or (lambda notice: None)
    begun = any((out / name).exists() for name in ("checkpoint.safetensors", "delta.safetensors"))
    if begun and not resume:
        raise RunError(f"{out} holds a run already: go on with --resume, or give another folder with --out")
    if resume and not (begun or (out / "run.json").exists()):
        raise RunError(f"{out} holds no run to resume: leave --resume out, or give the run's folder with --out")
    # all that can be refused is refused before anything is written
    prepared = prepare(spec)
    loader, validation = _loaders(prepared, options.workers)
    if options.tensorboard:
        require_tensorboard()
    for photos in (prepared.train, prepared.validation):
        for note in photos.notes:
            tell(note)
    settings = _settings(prepared)
    checkpointer = Checkpointer(out / "checkpoint.safetensors", prepared.model, prepared.adaptation, settings)
    at = checkpointer.load() if resume else None
    if checkpointer.notice:
        tell(checkpointer.notice)
    if at is None:  # nothing is learned yet: what is written down is what is asked for now
        if spec.calibrate:
            _calibrate(prepared, loader)
        _make_folder(out)
        write_bytes(out / "run.json", json.dumps(settings, indent=2).encode() + b"\n")
    if callbacks.on_start is not None:
        callbacks.on_start(prepared)

    def save(boundary: Boundary) -> None:
        if boundary.epoch_end:
            checkpointer.save(boundary)

    with contextlib.ExitStack() as stack:
        progress = at.progress if at is not None else None
        logs: list[Any] = [stack.enter_context(MetricsLog(out / "metrics.jsonl", progress))]
        if options.tensorboard:
            logs.append(stack.enter_context(contextlib.closing(TensorBoardLog(out / "tensorboard", progress))))
        result = fit(
            prepared.model,
            loader,
            validation,
            spec.fit,
            on_step=_all(logs, callbacks.on_step),
            on_epoch=_all(logs, callbacks.on_epoch),
            on_boundary=save,
            resume=at,
        )
    final = result.validation or evaluate(prepared.model, validation, micro_batch=spec.fit.micro_batch)
    delta = out / "delta.safetensors"
    save_delta(
        delta,
        prepared.model,
        prepared.adaptation,
        backbone=spec.backbone,
        norm=spec.norm,
        classes=prepared.train.classes,
        preprocessing=dataclasses.asdict(prepared.preprocessing),
        extra={"pretrained": spec.pretrained, "base_seed": spec.fit.seed},
    )
    plot_curves(out / "metrics.jsonl", out / "curves.png")
    return RunResult(out, prepared, result, final, delta.stat().st_size)


def _loaders(prepared: Prepared, workers: int) -> tuple[Loader, Loader]:
    spec, p = prepared.spec, prepared.preprocessing
    augment = TrainTransform(
        p.resolution,
        p.mean,
        p.std,
        scale=(spec.min_scale, 1.0),
        flip=spec.flip,
        color=spec.color,
        interpolation=p.interpolation,
    )
    plain = EvalTransform(p.resolution, p.mean, p.std, p.crop_fraction, p.interpolation)
    seed = spec.fit.seed
    training = Loader(prepared.train, augment, spec.batch_size, shuffle=True, seed=seed, workers=workers)
    return training, Loader(prepared.validation, plain, spec.batch_size, shuffle=False, workers=workers)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {out}: {error.strerror}; give another with --out") from error


@dataclass(frozen=True)
class _FirstImages:
    """The first batches of training images, in pieces of a micro-batch; decoded anew for each pass over them."""

    loader: Loader
    size: int

    def __iter__(self) -> Iterator[Tensor]:
        with contextlib.closing(self.loader.epoch(0)) as batches:
            for _, batch in zip(range(CALIBRATION_BATCHES), batches, strict=False):
                yield from batch.images.split(self.size)


def _calibrate(prepared: Prepared, loader: Loader) -> None:
    if prepared.adaptation.inserted:
        size = prepared.spec.fit.micro_batch or prepared.spec.batch_size
        calibrate_(prepared.model, prepared.adaptation, _FirstImages(loader, size))


def _settings(prepared: Prepared) -> dict[str, Any]:
    """What a run's bits depend on, as plain data: the specification, and which photographs there were."""
    settings = dataclasses.asdict(prepared.spec)
    settings["resolution"] = prepared.preprocessing.resolution
    settings["train_photos"] = prepared.train.fingerprint()
    settings["validation_photos"] = prepared.validation.fingerprint()
    settings["classes"] = list(prepared.train.classes)
    return settings


def _all(logs: list[Any], last: Callable[[Any], object] | None) -> Callable[[Any], None]:
    def write(info: Any) -> None:
        for log in logs:
            log.write(info)
        if last is not None:
            last(info)

    return write
