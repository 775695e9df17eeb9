"""What is looked at before a search begins or goes on: its settings, its folder, its budget."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinytl._atomic import write_bytes
from tinytl._differences import differences
from tinytl._found import SEARCH
from tinytl.data import PhotoSet
from tinytl.errors import BudgetError, RunError

from .planned import Conditions, cost_of
from .profile import Stopwatch
from .space import Space
from .spec import SearchSpec


def refuse_too_small(spec: SearchSpec, space: Space, conditions: Conditions) -> None:
    """Raise BudgetError where not even the smallest sub-network fits, and InputError for images that are too small."""
    smallest = cost_of(space.choice(space.smallest()), conditions)
    if smallest.memory_bytes > spec.budget_bytes:
        raise BudgetError(
            f"memory_budget is {spec.budget_bytes:,} bytes: the smallest sub-network of {spec.space} takes "
            f"{smallest.memory_bytes:,} bytes to train at {space.resolutions[0]} px and a batch_size of "
            f"{spec.batch_size}; give at least that, or a smaller --micro-batch or --resolutions",
            smallest.memory_bytes,
        )
    cost_of(space.choice(space.default(0)), conditions)  # lite modules halve an image once more


def conditions_of(spec: SearchSpec, classes: int) -> Conditions:
    """What costs are planned for, of photographs of so many classes."""
    return Conditions(
        classes=classes,
        norm=spec.norm,
        batch_size=spec.batch_size,
        micro_batch=spec.micro_batch,
        frozen_bits=spec.frozen_bits,
        optimizer_bits=spec.optimizer_bits,
        multiply_adds=spec.max_multiply_adds is not None or spec.max_step_seconds is not None,
    )


def settings_of(spec: SearchSpec, space: Space, train_set: PhotoSet, test_set: PhotoSet) -> dict[str, Any]:
    """All that the search's result depends on, as plain data."""
    return dataclasses.asdict(spec) | {
        "resolutions": list(space.resolutions),
        "train_photos": train_set.fingerprint(),
        "test_photos": test_set.fingerprint(),
        "classes": list(train_set.classes),
    }


def refuse_unless_free(out: Path, resume: bool) -> None:
    """Raise RunError where `out` holds a search and none is to be resumed, or none to resume."""
    there = os.path.exists(out / SEARCH)
    if there and not resume:
        raise RunError(f"{out} holds a search already: go on with --resume, or give another folder with --out")
    if resume and not there:
        raise RunError(f"{out} holds no search to resume: leave --resume out, or give the search's folder with --out")


def refuse_other(path: Path, settings: dict[str, Any]) -> None:
    """Raise RunError where a search was begun with other settings; the differences are listed."""
    if not path.exists():
        return
    try:
        before = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}; give another folder with --out") from error
    different = differences(json.loads(json.dumps(settings)), before)
    if different:
        raise RunError(
            f"cannot resume {path.parent}: it was begun with other settings: {'; '.join(different)}; "
            "use the same ones, or another folder"
        )


@contextlib.contextmanager
def kept_stopwatch(path: Path) -> Iterator[Stopwatch]:
    """Goes on from the file where the search is resumed, and is written whatever happens."""
    watch = Stopwatch.from_json(json.loads(path.read_text())) if path.exists() else Stopwatch()
    try:
        yield watch
    finally:
        if path.parent.exists():
            with contextlib.suppress(RunError):  # what it tells is worth less than what is being raised
                write_bytes(path, json.dumps(watch.to_json()).encode())
