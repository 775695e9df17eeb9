"""A program as it stands, measured on photographs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from tinytl._interrupt import Stop
from tinytl.data.folder import PhotoSet
from tinytl.errors import ProgramError

from .batches import filled, in_batches
from .machine import Machine
from .pixels import Recipe
from .scores import Scores, Tally


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


def classes_of(machine: Machine, meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the program's classes. Raises ProgramError for a program that does not say all that a run needs."""
    missing = [name for name in ("learned", "carried", "delta", "tensors") if name not in meta]
    classes = meta.get("delta", {}).get("classes") if not missing else None
    if missing or not isinstance(classes, list) or len(classes) != machine.classes:
        what = missing[0] if missing else f"names of its {machine.classes} classes"
        raise ProgramError(f"the program was compiled without its {what}: compile it again from a run or a folder")
    return tuple(classes)
