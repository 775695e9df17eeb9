"""`tinytl train`: fine-tune on a folder of photographs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# torch and the rest of the library are imported inside the commands: --help answers at once


def train(
    photos: Annotated[str, typer.Argument(help="Folder ROOT/CLASS/*.jpg, or a named data set (elpv).")],
    out: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("runs/train"),
    backbone: Annotated[str, typer.Option(help="See `tinytl backbones`.")] = "efficientnet_lite0",
    method: Annotated[str, typer.Option(help="See `tinytl methods`.")] = "tinytl-l+b",
    last_blocks: Annotated[int, typer.Option(help="Also train the last K blocks in full.")] = 0,
    norm: Annotated[str, typer.Option(help="bn (frozen statistics) or gn (with weight standardization).")] = "bn",
    weights: Annotated[Path | None, typer.Option(help="Weights file of the backbone.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Start from pretrained weights.")] = True,
    resolution: Annotated[int | None, typer.Option(help="Pixels a side; default: the backbone's own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 8,
    micro_batch: Annotated[int | None, typer.Option(help="Images at a time; the step stays the same.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the photographs.")] = 50,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the cosine.")] = 6e-4,
    optimizer: Annotated[str, typer.Option(help="adam or sgd.")] = "adam",
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.0,
    label_smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = 0.1,
    warmup_epochs: Annotated[int, typer.Option(help="Epochs of linear warm-up, among --epochs.")] = 0,
    min_scale: Annotated[float, typer.Option(help="Smallest share of a photograph in a training crop.")] = 0.22,
    flip: Annotated[bool, typer.Option(help="Mirror training images at random.")] = True,
    color: Annotated[bool, typer.Option(help="Distort brightness and saturation.")] = False,
    calibrate: Annotated[bool, typer.Option(help="Measure statistics for fresh lite modules first.")] = True,
    val_fraction: Annotated[float, typer.Option(help="Share of each class held out for validation.")] = 0.2,
    split_seed: Annotated[int, typer.Option(help="Of the choice of what is held out.")] = 0,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    workers: Annotated[int, typer.Option(help="Threads that decode photographs.")] = 2,
    threads: Annotated[int | None, typer.Option(help="Threads that compute.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard files.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the last line only.")] = False,
) -> None:
    """Fine-tune a backbone on photographs and leave the run in a folder."""
    from tinytl._threads import threads as with_threads
    from tinytl.engine import FitOptions
    from tinytl.run import train as run_train
    from tinytl.spec import RunOptions, TrainSpec

    spec = TrainSpec(
        photos=photos,
        backbone=backbone,
        method=method,
        last_blocks=last_blocks,
        norm=norm,
        weights=None if weights is None else str(weights),
        pretrained=pretrained,
        resolution=resolution,
        batch_size=batch_size,
        val_fraction=val_fraction,
        split_seed=split_seed,
        min_scale=min_scale,
        flip=flip,
        color=color,
        calibrate=calibrate,
        fit=FitOptions(
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            micro_batch=micro_batch,
            optimizer=optimizer,
            seed=seed,
            warmup_epochs=warmup_epochs,
        ),
    )
    console = Console(quiet=quiet)
    try:
        with with_threads(threads), TrainingDisplay(console) as display:
            options = RunOptions(workers=workers, threads=threads, tensorboard=tensorboard)
            result = run_train(spec, out, options=options, resume=resume, callbacks=display.callbacks())
    except KeyboardInterrupt:
        print(f"tinytl: interrupted; the same command with --resume goes on from {out}", file=sys.stderr)
        raise typer.Exit(130) from None
    e = result.evaluation
    Console().print(
        f"top-1 {e.top1:.1%}, balanced {e.balanced_accuracy:.1%} (largest class alone: {e.majority_share:.1%}) "
        f"on {e.images} held-out photographs; learned {result.delta_bytes / 1e6:.2f} MB in {out}",
        soft_wrap=True,
        markup=False,
    )


class TrainingDisplay:
    """A progress bar with the loss, the time left and the memory, and a line for each epoch."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} images/s"),
            TextColumn("process {task.fields[peak]:.0f} MB"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._progress.stop()

    def callbacks(self) -> Any:
        """What `tinytl.run.train` is to call."""
        from tinytl.run import Callbacks

        return Callbacks(self.start, self.step, self.epoch, self.notice)

    def start(self, prepared: Any) -> None:
        """Say what trains on what."""
        from tinytl.report import Column, table

        rows = [{"name": name, "value": value} for name, value in prepared.adaptation.rows()]
        title = f"{prepared.spec.backbone} on {prepared.spec.photos}"
        self._console.print(table(rows, [Column("name", ""), Column("value", title)]))
        self._console.print(
            f"{len(prepared.train)} photographs to train on, {len(prepared.validation)} held out, "
            f"{len(prepared.train.classes)} classes, {prepared.preprocessing.resolution} px"
        )

    def step(self, info: Any) -> None:
        """Move the bar."""
        fields = {
            "epoch": f"{info.epoch}/{info.steps // info.batches}",
            "loss": info.loss,
            "speed": info.images_per_second,
            "peak": info.peak_bytes / 1e6,
        }
        if self._task is None:
            self._task = self._progress.add_task("train", total=info.steps, **fields)
        self._progress.update(self._task, completed=info.step, **fields)

    def epoch(self, info: Any) -> None:
        """Print one line."""
        v = info.validation
        found = "" if v is None else f"  held out: top-1 {v.top1:.1%}, balanced {v.balanced_accuracy:.1%}"
        self._console.print(
            f"epoch {info.epoch}/{info.epochs}  loss {info.loss:.3f}  training {info.accuracy:.1%}{found}  "
            f"{info.images_per_second:.0f} images/s"
        )

    def notice(self, text: str) -> None:
        """Print what the user should know."""
        self._console.print(f"note: {text}", soft_wrap=True, markup=False, highlight=False)
