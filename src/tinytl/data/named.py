"""From what the user types, a folder or the name of a data set, to photographs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tinytl.data.check import Progress, checked
from tinytl.data.duplicates import with_copies_noted
from tinytl.data.elpv import elpv
from tinytl.data.folder import PhotoSet, has_splits, scan, scan_splits, split
from tinytl.errors import DataError, InputError, UnknownNameError

VAL_FRACTION = 0.2  # where nothing else is asked for
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
    import difflib  # not for whom the name is right

    if difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.5):
        raise UnknownNameError("data set or folder", name, DATASETS)
    also = "" if os.sep in name else f", and no data set of that name (known: {', '.join(sorted(DATASETS))})"
    raise DataError(
        f"no folder {name!r}{also}: expected a folder that holds a folder of photographs for each class; check the path"
    )


def refuse_among(spec: str | Path, out: str | Path) -> None:
    """Refuse to write a run's folder ``out`` into a folder of photographs, where it would become a class.

    Raises InputError; a hidden folder is none to `scan`, and passes.
    """
    folder = Path(spec).expanduser()
    root, inside = os.path.realpath(folder), Path(os.path.realpath(out))
    if not str(spec) or not os.path.isdir(folder) or not inside.is_relative_to(root):
        return
    if not any(part.startswith(".") for part in inside.relative_to(root).parts):
        raise InputError(
            f"the run's folder {str(out)!r} lies in the folder of photographs {str(folder)!r}, where it would be taken "
            "for a class: give another with --out"
        )


def resolve_split(
    spec: str | Path,
    fraction: float = VAL_FRACTION,
    seed: int = 0,
    *,
    strict: bool = False,
    workers: int = 2,
    on_progress: Progress | None = None,
) -> tuple[PhotoSet, PhotoSet]:
    """Return (train, validation): a folder's own train/ and val/ or test/ where it has them, else a stable
    `split`.

    Every photograph is read once: those that cannot be are left out before the split and noted, or refused
    where ``strict`` (see `checked`, also for the rest). Copies across the two are noted.

    Raises what `resolve`, `scan_splits`, `checked` and `split` raise; InputError for a ``fraction`` or ``seed``
    of a split that is made already.
    """
    check = functools.partial(checked, strict=strict, workers=workers, on_progress=on_progress)
    folder = Path(spec).expanduser()
    if str(spec) and os.path.isdir(folder) and has_splits(folder):
        for name, value, default in (("val_fraction", fraction, VAL_FRACTION), ("split_seed", seed, 0)):
            if value != default:
                raise InputError(
                    f"{name} is {value} and {str(folder)!r} has its own train/ and validation: leave {name} out, or "
                    f"give {str(folder / 'train')!r}"
                )
        train, validation = scan_splits(folder)
        return with_copies_noted(check(train), check(validation), workers=workers)
    return with_copies_noted(*split(check(resolve(spec)), fraction, seed), workers=workers)
