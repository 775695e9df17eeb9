"""A program's answers to photographs one by one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinytl.data.decode import open_photo
from tinytl.data.folder import find_photos, listed
from tinytl.errors import DataError, PhotoError

from .machine import Machine
from .pixels import Recipe
from .scores import probabilities


class Labelled(NamedTuple):
    """What `label` found; as `tinytl.trained.Labelled`.

    Attributes:
        answers: {"image": path, "labels": [{"label", "probability"}, ...]}, or {"image": path, "error": why}.
        notes: one line for each folder that holds what cannot be read.
        bad: the error of each image that was given by its own name and cannot be read.
    """

    answers: list[dict[str, Any]]
    notes: list[str]
    bad: list[PhotoError]


def label(
    machine: Machine, recipe: Recipe, classes: Sequence[str], images: Sequence[str], top: int, *, strict: bool
) -> Labelled:
    """The `top` most probable labels of each of `images`; of a folder among them, of each photograph in it.

    Raises:
        DataError: a folder cannot be read or holds no images; none in it can be read, or, if `strict`, one cannot.
        NotFiniteError: an answer is NaN or infinite.
    """
    found = Labelled([], [], [])

    def one(path: Path) -> PhotoError | None:
        try:
            with open_photo(path) as photo:
                pixels = recipe.evaluation(photo).tobytes()
        except PhotoError as error:
            if strict:
                raise
            found.answers.append({"image": str(path), "error": error.reason})
            return error
        machine.images[: len(pixels)] = pixels
        shares = probabilities(machine.evaluate(1))
        best = sorted(range(len(shares)), key=shares.__getitem__, reverse=True)[:top]
        labels = [{"label": classes[number], "probability": shares[number]} for number in best]
        found.answers.append({"image": str(path), "labels": labels})
        return None

    for image in images:
        if not os.path.isdir(image):
            error = one(Path(image))
            found.bad.extend([] if error is None else [error])
            continue
        within = find_photos(image)
        faults = [f"{str(path)!r} ({error.reason})" for path in within if (error := one(path)) is not None]
        if faults:
            found.notes.append(
                f"{len(faults)} of the {len(within)} photographs in {image!r} cannot be read: {listed(faults)}"
            )
            if len(faults) == len(within):
                raise DataError(f"{found.notes[-1]}; replace them")
    return found
