"""The same photograph twice: in training and in validation, or in two classes.

A copy in validation of what was trained on makes the accuracy look better than it is, and one photograph under two
labels teaches nothing. Only exact copies are found, byte for byte, links to one file among them; the same picture saved
anew has other bytes. Files of a size that no other has are not read.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from tinytl._file_hash import file_sha256
from tinytl.data.check import in_order
from tinytl.data.folder import PhotoSet, listed


def with_copies_noted(train: PhotoSet, validation: PhotoSet, *, workers: int = 2) -> tuple[PhotoSet, PhotoSet]:
    """Return both sets with a note, where there is reason for one: of copies across them, and across classes."""
    entries = [(photos, index) for photos in (train, validation) for index in range(len(photos))]
    names = {id(photos): _prefix(photos, train, validation) for photos in (train, validation)}
    leaks: list[str] = []
    contradictions: list[str] = []
    for group in _copies([photos.items[index][0] for photos, index in entries], workers):
        members = [entries[number] for number in group]
        spelled = [repr(names[id(photos)] + photos.name(index)) for photos, index in members]
        labels = [photos.items[index][1] for photos, index in members]
        trained = next((name for name, (photos, _) in zip(spelled, members, strict=True) if photos is train), None)
        if trained is not None:
            leaks += [
                f"{name} = {trained}"
                for name, (photos, _) in zip(spelled, members, strict=True)
                if photos is validation
            ]
        other = next((number for number, label in enumerate(labels) if label != labels[0]), None)
        if other is not None:
            contradictions.append(f"{spelled[0]} = {spelled[other]}")
    train_note, validation_note = (), ()
    if contradictions:
        train_note = (
            f"{len(contradictions)} photograph(s) lie in more than one class, byte for byte: "
            f"{listed(contradictions)}; keep each in the class that it shows",
        )
    if leaks:
        validation_note = (
            f"{len(leaks)} of the {len(validation)} photographs of validation are also in training, byte for byte: "
            f"{listed(leaks)}; the accuracy on them tells nothing of new photographs",
        )
    return (
        train.replaced(notes=train.notes + train_note),
        validation.replaced(notes=validation.notes + validation_note),
    )


def _prefix(photos: PhotoSet, train: PhotoSet, validation: PhotoSet) -> str:
    return "" if train.root == validation.root else f"{photos.root.name}/"


def _copies(paths: list[Path], workers: int) -> list[list[int]]:
    """Return groups of positions of files with equal content, in the order of the first of each."""
    by_size: defaultdict[int, list[int]] = defaultdict(list)
    for number, path in enumerate(paths):
        try:
            by_size[os.stat(path).st_size].append(number)
        except OSError:
            continue  # whoever reads it will name it
    asked = sorted(number for group in by_size.values() if len(group) > 1 for number in group)
    by_content: defaultdict[bytes, list[int]] = defaultdict(list)
    for number, digest in zip(asked, in_order(_digest, [paths[n] for n in asked], workers), strict=True):
        if digest is not None:
            by_content[digest].append(number)
    return [group for group in by_content.values() if len(group) > 1]


def _digest(path: Path) -> bytes | None:
    try:
        return file_sha256(path)
    except OSError:
        return None
