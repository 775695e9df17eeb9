"""Photographs for a program: listed, seen to be readable, and of the classes that it knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from tinytl.data.check import checked
from tinytl.data.folder import PhotoSet, has_splits, listed, scan_splits
from tinytl.data.named import resolve, resolve_split
from tinytl.errors import DataError

Progress = Callable[[int, int], object]


def of_classes(photos: PhotoSet, classes: Sequence[str]) -> PhotoSet:
    """Return the photographs with the program's numbers of classes.

    Raises DataError where there are classes that it was not compiled for, naming them. Some that are absent are noted.
    """
    unknown = [name for name in photos.classes if name not in classes]
    if unknown:
        absent = [name for name in classes if name not in photos.classes]
        lacking = f", and lacks {listed(map(repr, absent))}" if absent else ""
        raise DataError(
            f"{str(photos.root)!r} holds {len(unknown)} class(es) that the program does not know: "
            f"{listed(map(repr, unknown))}{lacking}; it was compiled for {len(classes)}: "
            f"{listed(map(repr, classes))}; rename or remove those folders, or compile a program for these photographs"
        )
    return photos.aligned_to(classes)


def has_own_split(photos: str) -> bool:
    """Whether it is a folder that `to_train` does not split: one with train/ and val/ or test/ in it."""
    folder = os.path.expanduser(photos)
    return os.path.isdir(folder) and has_splits(folder)


def to_train(
    photos: str,
    classes: Sequence[str],
    val_fraction: float,
    split_seed: int,
    *,
    strict: bool,
    on_check: Progress | None,
) -> tuple[PhotoSet, PhotoSet]:
    """Return (train, validation) as the lab splits them; each photograph is read once.

    Raises what `tinytl.data.resolve_split` and `of_classes` raise.
    """
    # no threads: each would bring its own memory to decode in
    train, validation = resolve_split(photos, val_fraction, split_seed, strict=strict, workers=0, on_progress=on_check)
    return of_classes(train, classes), of_classes(validation, classes)


def to_evaluate(photos: str, classes: Sequence[str], *, strict: bool, on_check: Progress | None) -> PhotoSet:
    """Return the photographs to evaluate on: of a folder with train/ and val/ or test/ in it, those not in train/.

    Raises what `tinytl.data.scan`, `tinytl.data.checked` and `of_classes` raise.
    """
    split = os.path.isdir(photos) and has_splits(photos)
    found = scan_splits(photos)[1] if split else resolve(photos, classes=classes)
    return checked(of_classes(found, classes), strict=strict, workers=0, on_progress=on_check)
