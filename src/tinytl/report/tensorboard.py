"""The same numbers for TensorBoard, on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinytl.checkpoint import Progress
from tinytl.engine import EpochInfo, StepInfo
from tinytl.errors import InputError


def require_tensorboard() -> Any:
    """TensorBoard's SummaryWriter class. Raises InputError when the extra is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "TensorBoard is not installed: pip install 'tinytl[tensorboard]', or leave --tensorboard out"
        ) from error
    return SummaryWriter


class TensorBoardLog:
    """Writes the same numbers for TensorBoard (an extra: ``pip install 'tinytl[tensorboard]'``).

    On resuming, TensorBoard is told to hide what lies after the point the run goes on from. Raises InputError
    when the extra is not installed.
    """

    def __init__(self, folder: Path, resume: Progress | None = None) -> None:
        self._writer = require_tensorboard()(str(folder), purge_step=resume.step + 1 if resume else None)

    def write(self, info: StepInfo | EpochInfo) -> None:
        """Add the scalars of one step or epoch, at the global step."""
        part = "epoch" if isinstance(info, EpochInfo) else "step"
        scalars = {f"{part}/loss": info.loss, f"{part}/accuracy": info.accuracy, f"{part}/lr": info.lr}
        scalars[f"{part}/images_per_second"] = info.images_per_second
        scalars[f"{part}/peak_MB"] = info.peak_bytes / 1e6
        if isinstance(info, EpochInfo) and info.validation:
            scalars["validation/loss"] = info.validation.loss
            scalars["validation/top1"] = info.validation.top1
            scalars["validation/balanced_accuracy"] = info.validation.balanced_accuracy
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, info.step)

    def sync(self) -> None:
        """Hand everything to the operating system: the writer's queue would die with the process."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
