"""What folders hold: in the order of names, hidden names left out, and an end even where links lead round in a loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tinytl.errors import DataError


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds, hidden names left out, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{str(folder)!r} cannot be read ({reason}): check the path and permissions") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path)  # entry.is_dir() raises for a link that leads to itself


def identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def walk(folder: Path, root: Path) -> Iterator[tuple[Path, bool]]:
    """Yield (path, is a file) for all that is not a folder, each folder once however many links lead to it.

    Links wait until all real folders have been seen, so that a photograph is named by its real place.
    """
    seen = {identity(above) for above in (root.resolve(), *root.resolve().parents)}
    folders, links = [folder], []
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        known = identity(current)
        if known in seen:
            continue
        seen.add(known)
        for entry in entries_of(current):
            path = current / entry.name
            if not is_folder(entry):
                yield path, os.path.isfile(path)
            else:
                (links if entry.is_symlink() else folders).append(path)
