"""A run without PyTorch: a program and photographs in, a folder with what was learned out.

The folder holds what the lab's does (`tinytl.run`): `run.json`, `metrics.jsonl`, `checkpoint.safetensors`, and at the
end `delta.safetensors`. Each is written whole or not at all; a run can be killed at any instant, and resumed it ends in
the same files as one that nobody disturbed. What a photograph looks like depends on (seed, epoch, photograph), what is
drawn in a step on (seed, step): the executor's state and a `Progress` are all that has to be kept.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tinytl._files import remove_temporaries, write_bytes
from tinytl._interrupt import Stop, stop_on_signals
from tinytl._keeper import Keeper
from tinytl._lock import lock_folder
from tinytl._metrics_log import MetricsFile
from tinytl._run_folder import CHECKPOINT, DELTA, METRICS, PREVIOUS, SETTINGS, made_folder, refuse_unless_free
from tinytl._schedule import learning_rate, step_seed
from tinytl.data.folder import PhotoSet
from tinytl.data.named import refuse_among
from tinytl.errors import DataError, Interrupted, NotFiniteError, RunError, TinyTLError

from .batches import filled, in_batches
from .checkpoint import Boundary, Checkpointer, Progress
from .delta import write_delta
from .evaluation import evaluate, finite
from .judge import judged
from .machine import Machine, program_file
from .photos import has_own_split, to_train
from .pixels import Recipe, epoch_order
from .process import give_back, peak_bytes
from .scores import Scores
from .settings import Settings, recorded, settings
from .shown import Result, Shown

FILES = (CHECKPOINT, PREVIOUS, DELTA, METRICS, SETTINGS)
MEND = "lower the learning rate (--lr)"


class Intervals(NamedTuple):
    """How often a checkpoint is written beside each epoch's end; None: not for that reason."""

    checkpoint_steps: int | None = None
    checkpoint_seconds: float | None = 60.0


def train(
    machine: Machine,
    program: Path,
    photos: str,
    out: Path,
    *,
    given: Mapping[str, Any] | None = None,
    intervals: Intervals | None = None,
    resume: bool = False,
    strict: bool = False,
    shown: Shown | None = None,
) -> Result:
    """Train an open program on photographs and leave the run in the folder `out`.

    SIGINT and SIGTERM stop the run where nothing is lost, as in `tinytl.run.train`.

    Args:
        machine: the open program.
        program: its file.
        photos: a folder of class folders, one with train/ and val/ in it, or the name of a data set.
        out: made if missing; refused if it holds a run already, unless `resume`, or if another run writes to it.
        given: fields of `Settings` in place of those that the program was compiled with.
        intervals: how often to save.
        resume: go on from the folder's checkpoint; a finished run is only evaluated again.
        strict: refuse photographs that cannot be read.
        shown: what to tell while it goes.

    Raises:
        InputError: something cannot be used; RunError: the loss is not finite, or the folder cannot be written or
            resumed; Interrupted: a signal came.
    """
    out, shown = Path(out), shown or Shown()
    with stop_on_signals() as stop:
        refuse_among(photos, out)
        refuse_unless_free(out, resume)
        meta = machine.meta
        classes = judged(meta, machine)
        compiled = meta.get("train", {})
        if has_own_split(photos):  # how others were split says nothing of these; what is given is refused
            compiled = {name: compiled[name] for name in compiled if name not in ("val_fraction", "split_seed")}
        chosen = settings(compiled, given or {})
        recipe = Recipe(meta["delta"]["preprocessing"], chosen)
        del meta  # some thousand names, which training needs no more

        def checked(done: int, count: int) -> None:
            stop.check()
            shown.check(done, count)

        training, validation = to_train(
            photos, classes, chosen.val_fraction, chosen.split_seed, strict=strict, on_check=checked
        )
        for note in (*training.notes, *validation.notes):
            shown.notice(note)
        stop.check()
        with made_folder(out), lock_folder(out, shown.notice):
            refuse_unless_free(out, resume)  # again: another run may have ended just now
            remove_temporaries(out / name for name in FILES)
            run = _Run(machine, program, photos, out, chosen, recipe, training, validation, stop, shown)
            return run.carry_out(intervals or Intervals(), resume, compiled)


class _Run:
    """One run in a folder that nobody else writes to."""

    def __init__(
        self,
        machine: Machine,
        program: Path,
        photos: str,
        out: Path,
        chosen: Settings,
        recipe: Recipe,
        train: PhotoSet,
        validation: PhotoSet,
        stop: Stop,
        shown: Shown,
    ) -> None:
        self._machine, self._photos, self._out = machine, photos, out
        self._program = program_file(Path(program))
        self._chosen, self._recipe = chosen, recipe
        self._train, self._validation = train, validation
        self._stop, self._shown = stop, shown
        self._batches = -(-len(train) // machine.batch)
        self._at = Progress()
        self._images, self._step_seconds, self._wait_seconds = 0, 0.0, 0.0

    def carry_out(self, intervals: Intervals, resume: bool, compiled: Mapping[str, Any]) -> Result:
        """Train and finish; `compiled` is what the program was compiled with."""
        out, machine, stop = self._out, self._machine, self._stop
        depends = self._depends()
        checkpointer = Checkpointer(out / CHECKPOINT, machine, depends)
        at = checkpointer.load() if resume else None
        if checkpointer.notice:
            self._shown.notice(checkpointer.notice)
        if at is None:
            record = {**recorded(compiled, self._chosen), "photos": self._photos, "classes": self._train.classes}
            record |= {name: depends[name] for name in ("train_photos", "validation_photos", "program")}
            write_bytes(out / SETTINGS, json.dumps(record, indent=2).encode() + b"\n")
        else:
            self._at = at
            self._refuse_other_length()
        stop.advice = f"the same command with --resume goes on from {out}"
        self._shown.start(machine, self._train, self._validation)
        give_back()
        scores: Scores | None = None
        with MetricsFile(out / METRICS, at) as log:
            keeper = Keeper(checkpointer, intervals, stop, log.sync)
            with self._kept_at_errors(keeper, checkpointer):
                while self._at.epoch < self._chosen.epochs:
                    scores = self._epoch(log, keeper)
        scores = scores or finite(evaluate(machine, self._recipe, self._validation, stop))
        size = write_delta(out / DELTA, machine, self._program)
        stop.advice = f"the run in {out} is finished"
        return Result(
            out=out,
            scores=scores,
            classes=self._train.classes,
            train_images=len(self._train),
            best_top1=self._at.best_top1,
            best_epoch=self._at.best_epoch,
            steps=self._at.step,
            delta_bytes=size,
            images=self._images,
            step_seconds=self._step_seconds,
            wait_seconds=self._wait_seconds,
        )

    def _depends(self) -> dict[str, Any]:
        """What the run's bits depend on, as plain data."""
        return {
            **self._chosen._asdict(),
            "program": self._program.sha256,
            "train_photos": self._train.fingerprint(),
            "validation_photos": self._validation.fingerprint(),
        }

    def _refuse_other_length(self) -> None:
        at, epochs = self._at, self._chosen.epochs
        if at.epoch > epochs or at.batch > self._batches or at.step != at.epoch * self._batches + at.batch:
            raise RunError(
                f"cannot resume: the checkpoint is at step {at.step} ({at.epoch} epochs, {at.batch} batches), "
                f"this run has {epochs} epochs of {self._batches} batches; were photographs added or removed?"
            )

    def _epoch(self, log: MetricsFile, keeper: Keeper) -> Scores:
        """Take the steps that are left of this epoch, evaluate, and save."""
        before = self._images, self._step_seconds, self._wait_seconds
        self._steps(log, keeper)
        at, begun = self._at, time.monotonic()
        epoch = at.epoch + 1
        scores = evaluate(self._machine, self._recipe, self._validation, self._stop)
        if not math.isfinite(scores.loss):
            raise NotFiniteError(f"the validation loss is {scores.loss} after epoch {epoch}; {MEND}")
        # ties: the earlier
        best = (scores.top1, epoch) if scores.top1 > at.best_top1 else (at.best_top1, at.best_epoch)
        images, seconds, waited = (
            now - then for now, then in zip((self._images, self._step_seconds, self._wait_seconds), before, strict=True)
        )
        line = {
            "kind": "epoch",
            "epoch": epoch,
            "epochs": self._chosen.epochs,
            "step": at.step,
            "loss": at.loss_sum / at.images,
            "accuracy": at.correct / at.images,
            "lr": learning_rate(at.step - 1, self._batches, self._chosen),
            "validation": scores.record(),
            "best_top1": best[0],
            "best_epoch": best[1],
            "trained_images": images,
            "seconds": seconds,
            "wait_seconds": waited,
            "validation_seconds": time.monotonic() - begun,
            "peak_bytes": peak_bytes(),
            "images_per_second": images / max(seconds + waited, 1e-9),
        }
        self._at = Progress(epoch=epoch, step=at.step, best_top1=best[0], best_epoch=best[1])
        log.append(line)
        self._shown.epoch(line)
        keeper.boundary(Boundary(self._at, epoch_end=True))
        return scores

    def _steps(self, log: MetricsFile, keeper: Keeper) -> None:
        machine, chosen, epoch = self._machine, self._chosen, self._at.epoch
        paths, labels = [path for path, _ in self._train.items], [label for _, label in self._train.items]
        order = epoch_order(chosen.seed, epoch, len(paths))
        batches = in_batches(order, machine.batch)[self._at.batch :]
        asked = time.monotonic()
        with contextlib.closing(
            filled(machine.images, paths, batches, lambda photo, number: self._recipe.training(photo, epoch, number))
        ) as source:
            for numbers in source:
                begun = time.monotonic()
                for place, number in enumerate(numbers):
                    machine.labels[place] = labels[number]
                line = self._step(len(numbers))
                ended = time.monotonic()
                line |= {
                    "seconds": ended - begun,
                    "wait_seconds": begun - asked,
                    "peak_bytes": peak_bytes(),
                    "images_per_second": len(numbers) / max(ended - asked, 1e-9),
                }
                self._images += len(numbers)
                self._step_seconds += ended - begun
                self._wait_seconds += begun - asked
                keeper.moved(None)
                log.append(line)
                self._shown.step(line)
                keeper.boundary(Boundary(self._at, epoch_end=False))
                asked = time.monotonic()

    def _step(self, images: int) -> dict[str, Any]:
        """Take one step and return its line of metrics, times left out."""
        at, chosen = self._at, self._chosen
        lr = learning_rate(at.step, self._batches, chosen)
        loss_sum, correct = self._machine.step(images, lr, step_seed(chosen.seed, at.step))
        self._at = at._replace(
            batch=at.batch + 1,
            step=at.step + 1,
            loss_sum=at.loss_sum + loss_sum,
            correct=at.correct + correct,
            images=at.images + images,
        )
        return {
            "kind": "step",
            "epoch": at.epoch + 1,
            "batch": at.batch + 1,
            "batches": self._batches,
            "step": at.step + 1,
            "steps": self._batches * chosen.epochs,
            "loss": loss_sum / images,
            "accuracy": correct / images,
            "lr": lr,
            "images": images,
        }

    @contextlib.contextmanager
    def _kept_at_errors(self, keeper: Keeper, checkpointer: Checkpointer) -> Iterator[None]:
        """Where the block raises where the state is that of the last boundary, save it there and say so."""
        try:
            yield
        except Interrupted:
            keeper.keep()  # and if that fails, it is what there is to tell
            raise
        except TinyTLError as error:
            said = str(error)
            whole = True
            if isinstance(error, NotFiniteError) and self._machine.bad_tensor >= 0:
                whole = False  # a gradient was bad: some tensors may have been updated before it was seen
            if isinstance(error, NotFiniteError):
                said = self._named(error)
            if whole:
                with contextlib.suppress(RunError):  # what stopped the run is what there is to tell
                    keeper.keep()
            if isinstance(error, NotFiniteError | DataError) and checkpointer.saved_step is not None:
                said = f"{said}; the state after step {checkpointer.saved_step} is in {checkpointer.path}"
            error.args = (said,)
            raise

    def _named(self, error: NotFiniteError) -> str:
        """Which step it was, and whose gradient."""
        if str(error).startswith("the validation loss"):
            return str(error)
        at, bad = self._at, self._machine.bad_tensor
        where = f"step {at.step + 1} (epoch {at.epoch + 1}, batch {at.batch + 1} of {self._batches})"
        if bad < 0:
            return f"the loss is NaN or infinite at {where}; {MEND}"
        return f"the gradient {self._machine.meta['tensors'][bad]!r} is NaN or infinite at {where}; {MEND}"
