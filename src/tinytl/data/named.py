"""From what the user types, a folder or the name of a data set, to photographs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tinytl.data.elpv import elpv
from tinytl.data.folder import PhotoSet, has_splits, scan, scan_splits, split
from tinytl.errors import DataError, UnknownNameError

DATASETS: dict[str, Callable[[], PhotoSet]] = {"elpv": elpv}


def resolve(spec: str | Path, *, classes: Sequence[str] | None = None) -> PhotoSet:
    """Return the photographs of a folder, or of a data set in `DATASETS`; what exists on disk wins.

    ``classes``: as for `scan`, indices point into it. Raises DataError as `scan` does, UnknownNameError for a
    name that is nearly one of ours.
    """
    folder = Path(spec).expanduser()
    if str(spec) and os.path.exists(folder):  # Path("") would be the current folder
        return scan(folder, classes=classes)
    name = str(spec)
    if name in DATASETS:
        photos = DATASETS[name]()
        return photos if classes is None else photos.aligned_to(classes)
    if difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.5):
        raise UnknownNameError("data set or folder", name, DATASETS)
    also = "" if os.sep in name else f", and no data set of that name (known: {', '.join(sorted(DATASETS))})"
    raise DataError(
        f"no folder {name!r}{also}: expected a folder that holds a folder of photographs for each class; check the path"
    )


def resolve_split(spec: str | Path, fraction: float = 0.2, seed: int = 0) -> tuple[PhotoSet, PhotoSet]:
    """Return (train, validation): a folder's own train/ and val/ or test/ where it has them, else a stable
    `split`.

    Raises what `resolve`, `scan_splits` and `split` raise.
    """
    folder = Path(spec).expanduser()
    if str(spec) and os.path.isdir(folder) and has_splits(folder):
        return scan_splits(folder)
    return split(resolve(spec), fraction, seed)
