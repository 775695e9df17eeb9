"""How long a training step takes: measured for some sub-networks, and told of the others by their multiply-adds.

A bound on time needs seconds of this machine, and a step of each of some hundred candidates would take longer than the
rest of the search. So the steps of a few are measured; a line through them, seconds over multiply-adds, bounds the
evolution; and the finalists are measured themselves.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from tinytl.engine.step import run_step
from tinytl.memory.step import StepSpec, build_batch, build_network, build_optimizer, pieces_of

from .planned import Conditions
from .space import Choice

PROBES, REPEATS = 6, 5


def step_seconds(choice: Choice, conditions: Conditions) -> float:
    """Median seconds of a training step of a sub-network, after one that is not counted; its weights are random."""
    spec = StepSpec(
        choice.backbone,
        choice.method,
        norm="gn" if conditions.norm == "gn" else "bn",
        resolution=choice.resolution,
        batch_size=conditions.batch_size,
        micro_batch=conditions.micro_batch,
        classes=conditions.classes,
        frozen_bits=conditions.frozen_bits,
        optimizer_bits=conditions.optimizer_bits,
    )
    model, _ = build_network(spec)
    optimizer = build_optimizer(spec, model.parameters())
    images, labels = build_batch(spec, torch.channels_last)
    size = spec.micro_batch or spec.batch_size
    found = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        run_step(model, optimizer, pieces_of(images, labels, size), spec.batch_size)
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


@dataclass(frozen=True)
class Line:
    """Seconds of a step by multiply-adds: ``base + each * multiply_adds``."""

    base: float
    each: float

    @staticmethod
    def through(multiply_adds: list[int], seconds: list[float]) -> Line:
        """The least-squares line, level at least: more work never takes less time."""
        each, base = np.polyfit(np.array(multiply_adds, float), np.array(seconds), 1)
        return Line(float(base), float(each)) if each > 0 else Line(float(np.mean(seconds)), 0.0)

    def __call__(self, multiply_adds: int) -> float:
        """Seconds of a step."""
        return self.base + self.each * multiply_adds


def probes(multiply_adds: list[int]) -> list[int]:
    """Which networks to measure: the indices of some from the least work to the most."""
    order = np.argsort(np.array(multiply_adds), kind="stable")
    return [int(order[at]) for at in np.unique(np.linspace(0, len(order) - 1, PROBES).astype(int))]
