"""A program as it stands, measured on photographs."""

from __future__ import annotations

import contextlib
import math

from tinytl._interrupt import Stop
from tinytl.data.folder import PhotoSet
from tinytl.errors import NotFiniteError

from .batches import filled, in_batches
from .machine import Machine
from .pixels import Recipe
from .scores import BROKEN, Scores, Tally


def evaluate(machine: Machine, recipe: Recipe, photos: PhotoSet, stop: Stop | None = None) -> Scores:
    """Measure a program as it stands, on photographs of its classes. Raises DataError for one that cannot be read."""
    tally = Tally(machine.classes)
    paths, labels = [path for path, _ in photos.items], [label for _, label in photos.items]
    numbers = in_batches(list(range(len(photos))), machine.batch)
    with contextlib.closing(
        filled(machine.images, paths, numbers, lambda photo, _: recipe.evaluation(photo))
    ) as batches:
        for batch in batches:
            tally.add(machine.evaluate(len(batch)), [labels[number] for number in batch])
            if stop is not None:
                stop.check()
    return tally.scores()


def finite(scores: Scores) -> Scores:
    """Return what was found. Raises NotFiniteError where it rests on answers that are none."""
    if not math.isfinite(scores.loss):
        raise NotFiniteError(BROKEN)
    return scores
