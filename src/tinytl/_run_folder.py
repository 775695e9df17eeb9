"""The folder of a run: the names in it, whether it is free, and how it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tinytl._files import sync_folder
from tinytl._lock import NAME as LOCK
from tinytl.errors import RunError

CHECKPOINT, DELTA, CURVES = "checkpoint.safetensors", "delta.safetensors", "curves.png"
METRICS, SETTINGS, PAGE = "metrics.jsonl", "run.json", "report.html"
PREVIOUS = f"{CHECKPOINT}.prev"


def refuse_unless_free(out: Path, resume: bool) -> None:
    """Raise RunError where `out` holds a run and none is to be resumed, or none to resume."""
    saved, learned = any((out / name).exists() for name in (CHECKPOINT, PREVIOUS)), (out / DELTA).exists()
    if (saved or learned) and not resume:
        raise RunError(f"{out} holds a run already: go on with --resume, or give another folder with --out")
    if learned and not saved:
        raise RunError(f"{out} holds what a run learned but no checkpoint to resume: give another folder with --out")
    # a lock without a run: killed before it had written anything
    if resume and not (saved or any((out / name).exists() for name in (SETTINGS, LOCK))):
        raise RunError(f"{out} holds no run to resume: leave --resume out, or give the run's folder with --out")


@contextlib.contextmanager
def made_folder(out: Path) -> Iterator[None]:
    """Make the folder and those above it; where the block raises, take away again what was made and is empty."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync_folder(folder.parent)
    except OSError as error:
        raise RunError(f"cannot make the folder {out}: {error.strerror}; give another with --out") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
        raise
