"""`metrics.jsonl`: what a run measured, one JSON object a line.

Two kinds of lines:

    {"kind": "step", "epoch": 1, "step": 17, "loss": ..., "accuracy": ..., "lr": ..., ...}
    {"kind": "epoch", "epoch": 1, "step": 40, "loss": ..., "accuracy": ..., "validation": {"top1": ..., ...}, ...}

Fractions are in [0, 1], times in seconds, memory in bytes. A resumed run first drops the lines of what it does again,
so every step and every epoch stands there once.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tinytl._atomic import write_bytes
from tinytl.checkpoint import Progress
from tinytl.engine import EpochInfo, Evaluation, StepInfo
from tinytl.errors import RunError

# what a line must hold as numbers: of steps and epochs, and of an epoch's validation
_MEANS, _RESULTS = ("loss", "accuracy"), ("loss", "top1", "majority_share")


def evaluation_record(evaluation: Evaluation, *, confusion: bool = False) -> dict[str, Any]:
    """Return an evaluation as JSON values by field name; ``confusion`` (C lists of C) on request."""
    record = {
        "top1": evaluation.top1,
        "balanced_accuracy": evaluation.balanced_accuracy,
        "images": evaluation.images,
        "loss": evaluation.loss,
        "majority_share": evaluation.majority_share,
    }
    return record | ({"confusion": evaluation.confusion.tolist()} if confusion else {})


def record(info: StepInfo | EpochInfo) -> dict[str, Any]:
    """Return the JSON values of one line of ``metrics.jsonl``."""
    values = {entry.name: getattr(info, entry.name) for entry in dataclasses.fields(info)}
    if isinstance(info, EpochInfo):
        values["validation"] = evaluation_record(info.validation) if info.validation else None
    kind = "epoch" if isinstance(info, EpochInfo) else "step"
    return {"kind": kind, **values, "images_per_second": info.images_per_second}


class MetricsLog:
    """Appends lines to ``metrics.jsonl``; its `write` is made to be an ``on_step`` or ``on_epoch`` of `fit`.

    A new run begins an empty file; a run that goes on (``resume``) keeps the lines up to there. Both are
    atomic. A line reaches the operating system at once, and the disk with `sync`, which every checkpoint calls.

    Raises RunError when the file cannot be written or, on resuming, read.
    """

    def __init__(self, path: Path, resume: Progress | None = None) -> None:
        self.path = Path(path)
        kept = read_metrics(self.path) if resume and self.path.exists() else []
        kept = [line for line in kept if resume and _is_done(line, resume)]
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        try:
            # unbuffered: what could not be written must not come back at close()
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}") from error

    def write(self, info: StepInfo | EpochInfo) -> None:
        """Append one line. Raises RunError when it cannot be written."""
        try:
            data = json.dumps(record(info), allow_nan=False).encode() + b"\n"
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}") from error

    def sync(self) -> None:
        """Force the lines to the disk, which is due before a checkpoint counts their steps as done."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``. A last line without its end, which a killed process may leave, is left out.

    Raises RunError when the file cannot be read or another line is damaged.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(data.split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or not _is_metric(line):
            raise RunError(f"{path}, line {number} is damaged: delete that line, or start the run again")
        lines.append(line)
    return lines


def _is_metric(line: Mapping[str, Any]) -> bool:
    counts = [line.get("epoch"), line.get("step")]
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts) or not _are_numbers(line, *_MEANS):
        return False
    validation = line.get("validation")
    if line.get("kind") == "step" or validation is None:
        return line.get("kind") in ("step", "epoch")
    return line.get("kind") == "epoch" and isinstance(validation, dict) and _are_numbers(validation, *_RESULTS)


def _are_numbers(values: Mapping[str, Any], *names: str) -> bool:
    found = [values.get(name) for name in names]
    # NaN and what is too large to draw fail the comparison
    return all(type(value) in (int, float) and abs(value) < 1e300 for value in found)  # type: ignore[arg-type]


def _is_done(line: Mapping[str, Any], resume: Progress) -> bool:
    # an epoch's line comes after its last step's: at that step the epoch is not yet done
    return line["epoch"] <= resume.epoch if line["kind"] == "epoch" else line["step"] <= resume.step
