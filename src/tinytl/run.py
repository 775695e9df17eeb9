"""A run: photographs and a specification in, a folder with what was learned out.

The folder holds `run.json` (the specification, written before anything else), `metrics.jsonl`, `checkpoint.safetensors`
while it runs, and at the end `delta.safetensors` and `curves.png`. The delta is all that `open_run` needs beside the
base network's own weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinytl.backbones import BACKBONES, Backbone, Preprocessing, load
from tinytl.checkpoint import Boundary, Checkpointer
from tinytl.data import (
    EvalTransform,
    Loader,
    PhotoSet,
    TrainTransform,
    open_photo,
    resolve,
    resolve_split,
)
from tinytl.delta import apply_delta, load_delta, save_delta
from tinytl.engine import EpochInfo, Evaluation, FitOptions, FitResult, StepInfo, evaluate, fit
from tinytl.errors import DeltaError, InputError, RunError, UnknownNameError
from tinytl.methods import Adaptation, adapt_, calibrate_, method
from tinytl.report import MetricsLog, TensorBoardLog, plot_curves

from ._atomic import write_bytes

SMALLEST_RESOLUTION = 32
CALIBRATION_BATCHES = 8


@dataclass(frozen=True)
class TrainSpec:
    """All that a run's result depends on; the command line's options have the same names.

    Attributes:
        photos: a folder ROOT/CLASS/*.jpg, one with train/ and val/ in it, or the name of a data set.
        backbone, norm, weights, pretrained: as for `tinytl.backbones.load`.
        method, last_blocks: as for `tinytl.methods.method`.
        resolution: pixels a side; None: the backbone's own.
        batch_size: images a step.
        val_fraction: share of each class held out for validation, unless the folder has its own split.
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
    train, validation = resolve_split(spec.photos, spec.val_fraction, spec.fit.seed)
    backbone = _base(spec.backbone, spec.pretrained, spec.norm, spec.weights, len(train.classes), spec.fit.seed)
    resolution = spec.resolution or backbone.preprocessing.resolution
    chosen = method(spec.method, last_blocks=spec.last_blocks)
    adaptation = adapt_(backbone.model, chosen, resolution=resolution, seed=spec.fit.seed)
    return Prepared(
        spec, train, validation, backbone, adaptation, replace(backbone.preprocessing, resolution=resolution)
    )


def train(
    spec: TrainSpec,
    out: Path,
    *,
    resume: bool = False,
    workers: int = 2,
    tensorboard: bool = False,
    callbacks: Callbacks | None = None,
) -> RunResult:
    """Train as `spec` says and leave the run in the folder `out`.

    Args:
        spec: what to train on, and how.
        out: made if missing; refused if it holds a run already, unless `resume`.
        resume: go on from the folder's checkpoint; a finished run is only evaluated again.
        workers: threads that decode photographs.
        tensorboard: also write event files into `out`/tensorboard.
        callbacks: what to tell while it goes.

    Raises:
        InputError: something in `spec` or `out` cannot be used; RunError: the loss is not finite, or the folder
            cannot be written or resumed.
    """
    callbacks = callbacks or Callbacks()
    tell = callbacks.on_notice or (lambda notice: None)
    checkpoint_path = out / "checkpoint.safetensors"
    if not resume and (out / "run.json").exists():
        raise RunError(f"{out} holds a run already: go on with --resume, or give another folder with --out")
    if resume and not (out / "run.json").exists():
        raise RunError(f"{out} holds no run to resume: leave --resume out, or give the run's folder with --out")
    prepared = prepare(spec)
    for photos in (prepared.train, prepared.validation):
        for note in photos.notes:
            tell(note)
    settings = _settings(prepared)
    if not resume:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the folder {out}: {error.strerror}; give another with --out") from error
        write_bytes(out / "run.json", json.dumps(settings, indent=2).encode() + b"\n")
    checkpointer = Checkpointer(checkpoint_path, prepared.model, prepared.adaptation, settings)
    at = checkpointer.load() if resume else None
    if checkpointer.notice:
        tell(checkpointer.notice)
    loader, validation = _loaders(prepared, workers)
    if at is None and spec.calibrate:
        _calibrate(prepared, loader)
    if callbacks.on_start is not None:
        callbacks.on_start(prepared)

    def save(boundary: Boundary) -> None:
        if boundary.epoch_end:
            checkpointer.save(boundary)

    with contextlib.ExitStack() as stack:
        progress = at.progress if at is not None else None
        logs: list[Any] = [stack.enter_context(MetricsLog(out / "metrics.jsonl", progress))]
        if tensorboard:
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


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A trained network, made again from its base and its delta."""

    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    adaptation: Adaptation

    @property
    def transform(self) -> EvalTransform:
        """How a photograph becomes its input."""
        p = self.preprocessing
        return EvalTransform(p.resolution, p.mean, p.std, p.crop_fraction, p.interpolation)

    def predict(self, path: Path, top: int = 3) -> list[dict[str, Any]]:
        """The `top` most probable labels of a photograph: [{"label": ..., "probability": ...}, ...], best first.

        Raises:
            DataError: the file cannot be read as a photograph.
        """
        with open_photo(path) as photo:
            image = torch.from_numpy(self.transform(photo))
        with torch.inference_mode():
            probabilities = self.model(image.unsqueeze(0)).softmax(1)[0]
        best = probabilities.topk(min(top, len(self.classes)))
        return [
            {"label": self.classes[int(index)], "probability": float(probability)}
            for probability, index in zip(best.values, best.indices, strict=True)
        ]

    def evaluate(self, photos: PhotoSet, *, batch_size: int = 8, workers: int = 2) -> Evaluation:
        """Top-1, balanced accuracy and the rest on photographs whose classes the run knows."""
        aligned = photos.aligned_to(self.classes)
        return evaluate(self.model, Loader(aligned, self.transform, batch_size, shuffle=False, workers=workers))


def open_run(path: Path, *, weights: Path | None = None) -> TrainedRun:
    """Open a run folder, or a delta file, in evaluation mode.

    Args:
        path: a run's folder, or the delta in it.
        weights: the base network's weights, where they cannot be had otherwise.

    Raises:
        InputError: no run there, or the base has other weights than the one it was trained on.
    """
    file = path / "delta.safetensors" if path.is_dir() or not path.exists() else path
    if path.is_dir() and not file.exists() and (path / "run.json").exists():
        raise RunError(f"{path} holds an unfinished run: finish it with `tinytl train ... --out {path} --resume`")
    delta = load_delta(file)
    pretrained, seed = delta.extra.get("pretrained", True), delta.extra.get("base_seed", 0)
    if type(pretrained) is not bool or type(seed) is not int or not 0 <= seed < 2**63:
        raise DeltaError(f"{file}: its base is described by {dict(delta.extra)!r}: expected what a run writes")
    own = str(weights) if weights is not None else _recorded_weights(file)
    backbone = _base(delta.backbone, pretrained, delta.norm, own, len(delta.classes), seed)
    preprocessing = Preprocessing(**_tuples(delta.preprocessing))
    adaptation = adapt_(backbone.model, delta.method, resolution=preprocessing.resolution, seed=seed)
    apply_delta(backbone.model, delta, adaptation)
    return TrainedRun(backbone.model.eval(), delta.classes, preprocessing, adaptation)


def photos_for(run: TrainedRun, photos: str) -> PhotoSet:
    """The photographs to evaluate a run on: a folder of class folders, some of the run's classes, or a data set."""
    return resolve(photos, classes=run.classes)


def _base(name: str, pretrained: bool, norm: Any, weights: str | None, classes: int, seed: int) -> Backbone:
    """The base network: random parts (the new classifier, all of it without weights) drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        path = None if weights is None else Path(weights)
        return load(name, pretrained=pretrained, norm=norm, weights=path, num_classes=classes)


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


def _calibrate(prepared: Prepared, loader: Loader) -> None:
    if not prepared.adaptation.inserted:
        return
    size = prepared.spec.fit.micro_batch or prepared.spec.batch_size
    images = []
    with contextlib.closing(loader.epoch(0)) as batches:
        for _, batch in zip(range(CALIBRATION_BATCHES), batches, strict=False):
            images += batch.images.split(size)
    calibrate_(prepared.model, prepared.adaptation, images)


def _settings(prepared: Prepared) -> dict[str, Any]:
    """What a run's bits depend on, as plain data: the specification, and which photographs there were."""
    settings = dataclasses.asdict(prepared.spec)
    settings["resolution"] = prepared.preprocessing.resolution
    settings["train_photos"] = prepared.train.fingerprint()
    settings["validation_photos"] = prepared.validation.fingerprint()
    settings["classes"] = list(prepared.train.classes)
    return settings


def _recorded_weights(delta: Path) -> str | None:
    """The weights file that the run was given, if it lies where it lay."""
    try:
        recorded = json.loads((delta.parent / "run.json").read_text()).get("weights")
    except (OSError, ValueError, AttributeError):
        return None
    return recorded if isinstance(recorded, str) and Path(recorded).is_file() else None


def _tuples(values: Any) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _all(logs: list[Any], last: Callable[[Any], object] | None) -> Callable[[Any], None]:
    def write(info: Any) -> None:
        for log in logs:
            log.write(info)
        if last is not None:
            last(info)

    return write


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with so many threads of PyTorch's, and put the old number back."""
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise InputError(f"threads {count}: expected 1 or more")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
