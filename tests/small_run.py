"""A run that takes part of a second: a network of three blocks on thirty photographs of 40 x 36 pixels.

Everything that draws at random is in it (order, crops, mirroring, colours, dropout), so equal bits mean something.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

from tinytl.backbones import BACKBONES, BackboneEntry
from tinytl.backbones._inverted_residual import BlockSpec, InvertedResidualNet
from tinytl.engine import FitOptions
from tinytl.report import read_metrics
from tinytl.run import CHECKPOINT, CURVES, DELTA, METRICS, SETTINGS
from tinytl.spec import TrainSpec

from .photographs import make_photographs

NAME = "small"  # of the backbone: BACKBONES must hold it while a run is made, see `entry`
BLOCKS = (BlockSpec(8, 8, 3, 1, 1), BlockSpec(8, 16, 3, 2, 3), BlockSpec(16, 16, 3, 1, 3))
EPOCHS, BATCHES = 2, 6
# what a line of metrics tells of the process and not of the run
TIMES = ("seconds", "wait_seconds", "validation_seconds", "images_per_second", "trained_images", "peak_bytes")


def entry() -> BackboneEntry:
    """The backbone, for ``BACKBONES[NAME]``."""
    build = functools.partial(InvertedResidualNet, BLOCKS, head_channels=32)
    return dataclasses.replace(BACKBONES["proxylessnas_mobile"], build=build)


def make_spec(folder: Path) -> TrainSpec:
    """Make the photographs in a new folder and return what is to be trained on them: two epochs of six steps."""
    photos = make_photographs(folder, each=10, size=(40, 36))
    return TrainSpec(
        str(photos),
        NAME,
        pretrained=False,
        resolution=32,
        batch_size=4,
        val_fraction=0.25,
        color=True,
        fit=FitOptions(epochs=EPOCHS, lr=3e-3, seed=1, micro_batch=2),
    )


def left_behind(out: Path) -> dict[str, str]:
    """Hashes of what a finished run left, of the metrics without their times: equal runs, equal hashes."""
    files = (DELTA, CHECKPOINT, CURVES, SETTINGS)
    found = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files}
    lines = [{key: line[key] for key in line if key not in TIMES} for line in read_metrics(out / METRICS)]
    return found | {METRICS: hashlib.sha256(json.dumps(lines).encode()).hexdigest()}
