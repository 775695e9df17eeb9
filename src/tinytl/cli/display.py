"""What `tinytl train` shows while a run goes, and what it says at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .output import print_line, print_note

if TYPE_CHECKING:  # these import torch; --help answers at once
    from tinytl.engine import EpochInfo, StepInfo
    from tinytl.run import Callbacks, Prepared, RunResult


def progress_bars(console: Console) -> Progress:
    """Bars that vanish at the end: what is done, how far, its ``figures``, and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class TrainingDisplay:
    """A progress bar with the loss, the time left and the memory, and a line for each epoch.

    Attributes:
        notes: what the run said that the user should know, also printed on stderr unless ``quiet``.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.notes: list[str] = []
        self._console, self._quiet = console, quiet
        self._progress = progress_bars(console)
        self._checking: TaskID | None = None
        self._training: TaskID | None = None

    def __enter__(self) -> TrainingDisplay:
        if self._console.is_terminal:  # into a file, a bar would leave one empty line
            self._progress.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def callbacks(self) -> Callbacks:
        """What `tinytl.run.train` is to call."""
        from tinytl.run import Callbacks

        return Callbacks(
            on_start=self.start,
            on_step=self.step,
            on_epoch=self.epoch,
            on_notice=self.notice,
            on_check=self.check,
        )

    def check(self, done: int, total: int) -> None:
        """Move the bar of photographs that are read once, before training, to see which cannot be."""
        if self._checking is None:
            self._checking = self._progress.add_task("checking photographs", total=total, figures="")
        self._progress.update(self._checking, completed=done, total=total, visible=done < total)

    def start(self, prepared: Prepared) -> None:
        """Say what trains on what."""
        from tinytl.report import Column, table

        rows = [{"name": name, "value": value} for name, value in prepared.adaptation.rows()]
        title = f"{prepared.spec.backbone} on {prepared.spec.photos}"
        self._console.print(table(rows, [Column("name", ""), Column("value", title)]))
        print_line(
            f"{len(prepared.train)} photographs to train on, {len(prepared.validation)} held out, "
            f"{len(prepared.train.classes)} classes, {prepared.preprocessing.resolution} px",
            self._console,
        )
        if prepared.planned is not None:
            for line in prepared.planned.lines(prepared.spec.batch_size):
                print_line(line, self._console)

    def step(self, info: StepInfo) -> None:
        """Move the bar."""
        epoch = f"epoch {info.epoch}/{info.steps // info.batches}"
        figures = f"loss {info.loss:.3f}  {info.images_per_second:.0f} images/s  process {info.peak_bytes / 1e6:.0f} MB"
        if self._training is None:
            self._training = self._progress.add_task(epoch, total=info.steps, figures=figures)
        self._progress.update(self._training, completed=info.step, description=epoch, figures=figures)

    def epoch(self, info: EpochInfo) -> None:
        """Print one line."""
        v = info.validation
        found = "" if v is None else f"  held out: top-1 {v.top1:.1%}, balanced {v.balanced_accuracy:.1%}"
        print_line(
            f"epoch {info.epoch}/{info.epochs}  loss {info.loss:.3f}  training {info.accuracy:.1%}{found}  "
            f"{info.images_per_second:.0f} images/s",
            self._console,
        )

    def notice(self, text: str) -> None:
        """Print what the user should know."""
        self.notes.append(text)
        if not self._quiet:
            print_note(text)  # a bar that is being drawn gives way to it


def result_record(result: RunResult, notes: list[str]) -> dict[str, Any]:
    """A finished run as `tinytl train --json` prints it: bytes, seconds, fractions.

    What is about training is None where this process did not train, the resumed run being finished already.
    """
    from tinytl.report import evaluation_record

    fit = result.fit
    return {
        "out": str(result.out),
        **evaluation_record(result.evaluation),
        "classes": list(result.prepared.train.classes),
        "train_images": len(result.prepared.train),
        "best_top1": fit.best_top1,
        "best_epoch": fit.best_epoch,
        "steps": fit.steps,
        "delta_bytes": result.delta_bytes,
        "seconds": fit.seconds,
        "images_per_second": _images_per_second(result),
        "step_share": fit.step_share,
        "peak_bytes": max((info.peak_bytes for info in fit.epochs), default=None),
        "cache": None
        if result.cache is None
        else {
            "limit_bytes": result.cache.limit_bytes,
            "held_bytes": result.cache.held_bytes,
            "reads": result.cache.reads,
            "hits": result.cache.hits,
        },
        "notes": notes,
    }


def summary(result: RunResult) -> list[str]:
    """A finished run in one line, and one or two more on how it was carried out if it was trained here."""
    e, fit = result.evaluation, result.fit
    lines = [
        f"top-1 {e.top1:.1%}, balanced {e.balanced_accuracy:.1%} (largest class alone: {e.majority_share:.1%}) "
        f"on {e.images} held-out photographs; learned {result.delta_bytes / 1e6:.2f} MB in {result.out}"
    ]
    speed = _images_per_second(result)
    if speed is not None and fit.step_share is not None:
        peak = max(info.peak_bytes for info in fit.epochs)
        lines.append(
            f"{speed:.1f} images/s in training: {fit.step_share:.0%} of the time in steps, the rest waiting for "
            f"photographs; process {peak / 1e6:.0f} MB at its peak"
        )
        if result.cache is not None:
            lines.append(result.cache.describe())
    return lines


def _images_per_second(result: RunResult) -> float | None:
    epochs = result.fit.epochs
    seconds = sum(info.seconds + info.wait_seconds for info in epochs)
    return sum(info.trained_images for info in epochs) / seconds if seconds else None
