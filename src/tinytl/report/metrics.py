"""`metrics.jsonl`: what a run measured, one JSON object a line.

Two kinds of lines:

    {"kind": "step", "epoch": 1, "step": 17, "loss": ..., "accuracy": ..., "lr": ..., ...}
    {"kind": "epoch", "epoch": 1, "step": 40, "loss": ..., "accuracy": ..., "validation": {"top1": ..., ...}, ...}

Fractions are in [0, 1], times in seconds, memory in bytes. A resumed run first drops the lines of what it does again,
so every step and every epoch stands there once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tinytl._metrics_log import MetricsFile, read_metrics
from tinytl.engine import EpochInfo, Evaluation, StepInfo

__all__ = ["MetricsLog", "evaluation_record", "read_metrics", "record"]


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


class MetricsLog(MetricsFile):
    """``metrics.jsonl`` of a run; its `write` is made to be an ``on_step`` or ``on_epoch`` of `fit`."""

    def write(self, info: StepInfo | EpochInfo) -> None:
        """Append one line. Raises RunError when it cannot be written."""
        self.append(record(info))
