"""One pass over photographs before anything is trained on them: which of them can be read at all?

Each file is opened and decoded to its last byte, a JPEG at an eighth of its size: that takes a third of the time, and
all of the compressed data are read all the same, so that a missing end is seen. What cannot be used is left out, named
and counted, or refused.

A file that was found good or bad stays so in this process while its size and its times of change stay as they were.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tinytl.data.decode import open_photo
from tinytl.data.folder import PhotoSet, listed
from tinytl.errors import DataError, PhotoError

S = TypeVar("S")
T = TypeVar("T")

Progress = Callable[[int, int], object]  # how many are done, of how many

_REMEMBERED = 1 << 16  # files, at some 300 bytes each
_AT_ONCE = 1024  # tasks handed to the threads; a task waiting weighs as much as a photograph's name


def checked(
    photos: PhotoSet, *, strict: bool = False, workers: int = 2, on_progress: Progress | None = None
) -> PhotoSet:
    """Return the photographs that can be read, with a note that names and counts those that cannot.

    ``strict``: refuse them instead. ``workers``: threads that decode; the result does not depend on them.
    ``on_progress`` is called in the calling thread with (done, all).

    Raises DataError where ``strict`` refuses, or where no photograph is left of a class that had some.
    """
    reasons = list(in_order(_reason, [path for path, _ in photos.items], workers, on_progress))
    bad = [index for index, reason in enumerate(reasons) if reason is not None]
    if not bad:
        return photos
    named = listed(f"{photos.name(index)!r} ({reasons[index]})" for index in bad)
    what = f"{len(bad)} of the {len(photos)} photographs in {str(photos.root)!r} cannot be read"
    if len(bad) == len(photos):
        raise DataError(f"{what}: {named}; replace them")
    if strict:
        raise DataError(f"{what}: {named}; replace or remove them, or train without --strict to leave them out")
    kept = tuple(item for item, reason in zip(photos.items, reasons, strict=True) if reason is None)
    left = Counter(label for _, label in kept)
    for index in bad:
        label = photos.items[index][1]
        if not left[label]:
            raise DataError(
                f"no photograph of the class {photos.classes[label]!r} in {str(photos.root)!r} can be read ({named}): "
                "replace them, or remove that class folder"
            )
    return photos.replaced(items=kept, notes=(*photos.notes, f"{what} and were left out: {named}"))


def in_order(
    function: Callable[[S], T], values: Sequence[S], workers: int, on_progress: Progress | None = None
) -> Iterator[T]:
    """Yield ``function`` of each value, in the values' order, computed in ``workers`` threads; 0: in this one."""
    if workers == 0:
        for done, value in enumerate(values, start=1):
            yield function(value)
            if on_progress is not None:
                on_progress(done, len(values))
        return
    from concurrent.futures import ThreadPoolExecutor  # for those alone who ask for threads

    pool, done = ThreadPoolExecutor(workers, thread_name_prefix="tinytl-check"), 0
    try:
        for start in range(0, len(values), _AT_ONCE):
            for result in pool.map(function, values[start : start + _AT_ONCE]):
                done += 1
                yield result
                if on_progress is not None:
                    on_progress(done, len(values))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _reason(path: Path) -> str | None:
    try:
        status = os.stat(path)
    except OSError:
        return _reason_to_leave_out(path)
    return _remembered(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(_REMEMBERED)
def _remembered(path: Path, size: int, modified: int, changed: int) -> str | None:
    return _reason_to_leave_out(path)


def _reason_to_leave_out(path: Path) -> str | None:
    """Return why a photograph cannot be used, in a word or two; None: it can."""
    try:
        with open_photo(path) as photo:
            photo.reduced(8)
    except PhotoError as error:
        return error.reason
    return None
