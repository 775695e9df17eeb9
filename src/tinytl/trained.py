"""A finished run opened again: the base network, its delta, and what they say of photographs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinytl.backbones import Backbone, Preprocessing, load
from tinytl.data import (
    EvalTransform,
    Loader,
    PhotoSet,
    checked,
    find_photos,
    has_splits,
    listed,
    open_photo,
    resolve,
    scan_splits,
)
from tinytl.delta import apply_delta, load_delta
from tinytl.engine import Evaluation, evaluate
from tinytl.errors import DataError, DeltaError, PhotoError, RunError
from tinytl.methods import Adaptation, adapt_
from tinytl.nn.packing import pack_frozen_
from tinytl.spec import FROZEN_BITS

MAX_RECORD_BYTES = 16_000_000  # of a run.json; one cut off there is no JSON, and tells nothing


@dataclass(frozen=True)
class Labelled:
    """What `TrainedRun.label` found.

    Attributes:
        answers: {"image": path, "labels": as of `TrainedRun.predict`}, or {"image": path, "error": why}.
        notes: one line for each folder that holds what cannot be read.
        bad: the error of each image that was given by its own name and cannot be read.
    """

    answers: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    bad: tuple[PhotoError, ...]


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A trained network, made again from its base and its delta.

    Attributes:
        model: in evaluation mode.
        classes: in the order of the logits.
        preprocessing: how its input is made.
        adaptation: what adapt_ did.
        trained_on: the photographs it was trained on, as given then; None where the delta lies alone.
    """

    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    adaptation: Adaptation
    trained_on: str | None = None

    def notes_on(self, photos: str) -> tuple[str, ...]:
        """What to know before believing an evaluation on `photos`."""
        if photos != self.trained_on or (os.path.isdir(photos) and has_splits(photos)):
            return ()
        return (f"{photos} is what the run was trained on: most of these photographs are not new to it",)

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

    def label(self, images: Sequence[Path], top: int = 3, *, strict: bool = False) -> Labelled:
        """`predict` for each of `images`; of a folder among them, for each photograph in it.

        Raises:
            DataError: a folder cannot be read or holds no images; none in it can be read, or, if `strict`, one
                cannot.
        """
        answers: list[dict[str, Any]] = []
        bad: list[PhotoError] = []
        notes: list[str] = []

        def one(image: Path) -> PhotoError | None:
            try:
                answers.append({"image": str(image), "labels": self.predict(image, top)})
            except PhotoError as error:
                if strict:
                    raise
                answers.append({"image": str(image), "error": error.reason})
                return error
            return None

        for path in images:
            if not os.path.isdir(path):
                error = one(path)
                bad += [] if error is None else [error]
                continue
            within = find_photos(path)
            faults = [f"{str(image)!r} ({error.reason})" for image in within if (error := one(image)) is not None]
            if faults:
                what = f"{len(faults)} of the {len(within)} photographs in {str(path)!r} cannot be read"
                notes.append(f"{what}: {listed(faults)}")
                if len(faults) == len(within):
                    raise DataError(f"{notes[-1]}; replace them")
        return Labelled(tuple(answers), tuple(notes), tuple(bad))

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
    folder = os.path.isdir(path)  # os.path answers for any name; Path raises for one that is too long
    file = path / "delta.safetensors" if folder or not os.path.exists(path) else path
    if folder and not file.exists() and (path / "run.json").exists():
        raise RunError(f"{path} holds an unfinished run: finish it with `tinytl train ... --out {path} --resume`")
    delta = load_delta(file)
    pretrained, seed = delta.extra.get("pretrained", True), delta.extra.get("base_seed", 0)
    bits, codebook = delta.extra.get("frozen_bits", 32), delta.extra.get("codebook", False)
    known = type(pretrained) is bool and type(seed) is int and 0 <= seed < 2**63
    known = known and type(bits) is int and bits in FROZEN_BITS and type(codebook) is bool
    if not known or (codebook and bits != 8):
        raise DeltaError(f"{file}: its base is described by {dict(delta.extra)!r}: expected what a run writes")
    recorded = _recorded(file, "weights")
    own = str(weights) if weights is not None else recorded if recorded and os.path.isfile(recorded) else None
    backbone = base_network(delta.backbone, pretrained, delta.norm, own, len(delta.classes), seed)
    preprocessing = Preprocessing(**delta.preprocessing)
    adaptation = adapt_(backbone.model, delta.method, resolution=preprocessing.resolution, seed=seed)
    if bits < 32:
        pack_frozen_(backbone.model, bits, codebook)
    apply_delta(backbone.model, delta, adaptation)
    return TrainedRun(backbone.model.eval(), delta.classes, preprocessing, adaptation, _recorded(file, "photos"))


def photos_for(run: TrainedRun, photos: str, *, strict: bool = False, workers: int = 2) -> PhotoSet:
    """The photographs to evaluate a run on: a folder of class folders (some of the run's classes), or a data set.

    Of a folder with train/ and val/ or test/ in it, those that are not in train/. Those that cannot be read are left
    out and noted, or refused if `strict` (see `tinytl.data.checked`).
    """
    folder = Path(photos)
    if os.path.isdir(folder) and has_splits(folder):
        found = scan_splits(folder)[1].aligned_to(run.classes)
    else:
        found = resolve(photos, classes=run.classes)
    return checked(found, strict=strict, workers=workers)


def base_network(name: str, pretrained: bool, norm: Any, weights: str | None, classes: int, seed: int) -> Backbone:
    """The base network: random parts (the new classifier, all of it without weights) drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        path = None if weights is None else Path(weights)
        return load(name, pretrained=pretrained, norm=norm, weights=path, num_classes=classes)


def _recorded(delta: Path, key: str) -> str | None:
    """What the run beside a delta was given as `key`, if it is there and a text."""
    try:
        with open(delta.parent / "run.json", "rb") as file:
            value = json.loads(file.read(MAX_RECORD_BYTES)).get(key)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return value if isinstance(value, str) else None
