"""Fine-tuning of the super-network on the target: the main network frozen, a random sub-network each step.

Step s draws its sub-network, its images and its dropout from (seed, s) alone, so parameters, Adam's slots and s are all
there is to keep, and a run that is cut goes on to the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tinytl._atomic import DamagedFileError, read_sealed, write_sealed
from tinytl._interrupt import Stop
from tinytl.errors import NotFiniteError, RunError

from .shared import SharedNet
from .target import Target

KIND = "tinytl-search/1"
CALIBRATION_PHOTOS = 64


@dataclass(frozen=True)
class TuneInfo:
    """A step of fine-tuning: its number from 1, how many there are, the loss of its sub-network, its images' size."""

    step: int
    steps: int
    loss: float
    resolution: int


class Tuning:
    """Fine-tunes `shared`, and keeps it in a file.

    Args:
        shared: as it was made; `resume` or `begin` set it.
        target: what it learns from.
        path: of the checkpoint, which at the end is the super-network.
        seconds: between two checkpoints.
    """

    def __init__(self, shared: SharedNet, target: Target, path: Path, seconds: float) -> None:
        self._shared, self._target, self._path, self._every = shared, target, path, seconds
        self._optimizer = torch.optim.Adam(shared.parameters(), lr=target.spec.lr)
        self.step = 0

    @property
    def steps(self) -> int:
        """Of the whole fine-tuning."""
        return self._target.spec.tune_epochs * self._target.tune_steps

    def begin(self) -> None:
        """Measure the lite modules' statistics on the first images."""
        resolutions = self._shared.space.resolutions
        images = self._target.calibration_images(resolutions[len(resolutions) // 2], CALIBRATION_PHOTOS)
        self._shared.calibrate_(lambda: images)

    def resume(self) -> None:
        """Go on from the file. Raises RunError when it is damaged or of another network."""
        tensors, metadata = read_shared_(self._shared, self._path)
        self.step = int(metadata["step"])
        for name, parameter in self._shared.named_parameters():
            slots = {
                slot: tensors[f"adam.{name}.{slot}"]
                for slot in ("step", "exp_avg", "exp_avg_sq")
                if f"adam.{name}.{slot}" in tensors
            }
            if slots:
                self._optimizer.state[parameter] = slots

    def save(self) -> None:
        """Write the file, whole or not at all."""
        tensors = {f"net.{name}": value for name, value in self._shared.state_dict().items()}
        if self.step < self.steps:  # a finished super-network needs no optimizer
            for name, parameter in self._shared.named_parameters():
                for slot, value in self._optimizer.state.get(parameter, {}).items():
                    tensors[f"adam.{name}.{slot}"] = value
        write_sealed(self._path, KIND, tensors, {"step": self.step})

    def run(self, stop: Stop, on_step: Callable[[TuneInfo], object] | None = None) -> None:
        """Take the steps that are left; a stop that is asked for saves first. Raises NotFiniteError, Interrupted."""
        saved = time.monotonic()
        while self.step < self.steps:
            if stop.asked is not None:
                self.save()
                stop.check()
            info = self._take()
            if on_step is not None:
                on_step(info)
            if time.monotonic() - saved >= self._every:
                self.save()
                saved = time.monotonic()
        self.save()

    def _take(self) -> TuneInfo:
        shared, spec = self._shared, self._target.spec
        genome = shared.space.sample(np.random.default_rng((spec.seed, 1, self.step)))
        shared.choose(genome)
        shared.train()
        resolution = shared.space.resolution(genome)
        images, labels = self._target.tune_batch(self.step, resolution)
        for group in self._optimizer.param_groups:
            group["lr"] = spec.lr * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        with torch.random.fork_rng(devices=[]), shared.only_used():
            torch.manual_seed(np.random.default_rng((spec.seed, 2, self.step)).integers(2**62))
            loss = F.cross_entropy(shared(images), labels, label_smoothing=spec.label_smoothing)
            if not bool(loss.isfinite()):
                raise NotFiniteError(
                    f"the loss of the super-network is {loss.item()} at step {self.step + 1}: give a lower --lr"
                )
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self._optimizer.step()
        self.step += 1
        return TuneInfo(self.step, self.steps, loss.item(), resolution)


def read_shared_(shared: SharedNet, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a super-network, and return all that its file holds.

    Raises RunError when the file is damaged or of another network.
    """
    try:
        tensors, metadata, _ = read_sealed(path, KIND)
        shared.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
    except (DamagedFileError, RuntimeError) as error:
        raise RunError(f"{path} {str(error).splitlines()[0]}: remove it to fine-tune anew") from error
    return tensors, metadata
