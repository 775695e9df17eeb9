"""The log of what a run measures: lines of JSON, one behind the other, cut off where a resumed run goes on.

What stands in a line is said in `tinytl.report.metrics`.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from tinytl._files import write_bytes
from tinytl.errors import RunError

# what a line must hold as numbers: of steps and epochs, and of an epoch's validation
_MEANS, _RESULTS = ("loss", "accuracy"), ("loss", "top1", "majority_share")


Self = TypeVar("Self", bound="MetricsFile")


class Done(Protocol):
    """Where a run stands: `tinytl.checkpoint.Progress`, or anything of this shape."""

    @property
    def epoch(self) -> int: ...
    @property
    def step(self) -> int: ...


class MetricsFile:
    """Appends lines to ``metrics.jsonl``; `append` writes one.

    A new run begins an empty file; a run that goes on (``resume``) keeps the lines up to there. Both are
    atomic. A line reaches the operating system at once, and the disk with `sync`, which every checkpoint calls.

    Raises RunError when the file cannot be written or, on resuming, read.
    """

    def __init__(self, path: Path, resume: Done | None = None) -> None:
        self.path = Path(path)
        kept = read_metrics(self.path) if resume and self.path.exists() else []
        kept = [line for line in kept if resume and _is_done(line, resume)]
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        try:
            # unbuffered: what could not be written must not come back at close()
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}") from error

    def append(self, line: Mapping[str, Any]) -> None:
        """Append one line. Raises RunError when it cannot be written."""
        try:
            data = json.dumps(line, allow_nan=False).encode() + b"\n"
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

    def __enter__(self: Self) -> Self:
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


def _is_done(line: Mapping[str, Any], resume: Done) -> bool:
    # an epoch's line comes after its last step's: at that step the epoch is not yet done
    return line["epoch"] <= resume.epoch if line["kind"] == "epoch" else line["step"] <= resume.step
