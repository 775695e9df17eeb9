"""What a run on the device tells: while it goes, and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tinytl.data.folder import PhotoSet

from .machine import Machine
from .scores import Scores


class Shown:
    """What a run tells while it goes. Each method may be given another body; these do nothing."""

    def check(self, done: int, count: int) -> None:
        """So many photographs of so many were read before training."""

    def start(self, machine: Machine, train: PhotoSet, validation: PhotoSet) -> None:
        """Training begins."""

    def step(self, line: Mapping[str, Any]) -> None:
        """A step was taken; `line` is that of metrics.jsonl."""

    def epoch(self, line: Mapping[str, Any]) -> None:
        """An epoch ended; `line` is that of metrics.jsonl."""

    def notice(self, text: str) -> None:
        """Something that the user should know."""


class Result(NamedTuple):
    """What a run left behind. `images` and `seconds` are of the steps that were taken in this process."""

    out: Path
    scores: Scores
    classes: tuple[str, ...]
    train_images: int
    best_top1: float
    best_epoch: int
    steps: int
    delta_bytes: int
    images: int
    step_seconds: float
    wait_seconds: float
