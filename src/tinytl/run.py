"""A run: photographs and a specification in, a folder with what was learned out.

The folder holds `run.json` (the specification), `config.toml` (every option, to repeat the run with), `metrics.jsonl`
and `checkpoint.safetensors`, and at the end `delta.safetensors`, `curves.png` and, if asked for, `report.html`.
`tinytl.trained.open_run` opens it again. Each of these is written whole or not at all, so that a run can be killed at
any instant; resumed, it ends in the same files as one that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytl._atomic import remove_temporaries, write_bytes
from tinytl._interrupt import Stop, stop_on_signals
from tinytl._keeper import Keeper
from tinytl._lock import lock_folder
from tinytl._prepared import Prepared, calibrate, loaders, prepare, settings_of
from tinytl._run_folder import (
    CHECKPOINT,
    CURVES,
    DELTA,
    METRICS,
    PAGE,
    PREVIOUS,
    SETTINGS,
    made_folder,
    refuse_unless_free,
)
from tinytl._run_page import page_of
from tinytl._threads import threads
from tinytl.checkpoint import Checkpointer, Progress, Resume
from tinytl.config import FILE as CONFIG
from tinytl.config import write_config
from tinytl.data import PhotoCache, refuse_among
from tinytl.delta import save_delta
from tinytl.engine import EpochInfo, Evaluation, FitResult, StepInfo, evaluate, fit
from tinytl.errors import DataError, InputError, Interrupted, NotFiniteError, RunError, TinyTLError
from tinytl.report import MetricsLog, TensorBoardLog, plot_curves, require_tensorboard, write_page
from tinytl.spec import RunOptions, TrainSpec

__all__ = ["Callbacks", "Prepared", "RunResult", "prepare", "train"]

FILES = (CHECKPOINT, PREVIOUS, DELTA, CURVES, METRICS, SETTINGS, PAGE, CONFIG)


@dataclass(frozen=True)
class Callbacks:
    """What a run tells while it goes: each is called with one value, and may be left out."""

    on_start: Callable[[Prepared], object] | None = None
    on_step: Callable[[StepInfo], object] | None = None
    on_epoch: Callable[[EpochInfo], object] | None = None
    on_notice: Callable[[str], object] | None = None
    on_check: Callable[[int, int], object] | None = None  # photographs read before training, and how many there are

    def notice(self, text: str) -> None:
        """Call ``on_notice``, if there is one."""
        if self.on_notice is not None:
            self.on_notice(text)


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run left behind."""

    out: Path
    prepared: Prepared
    fit: FitResult
    evaluation: Evaluation
    delta_bytes: int
    cache: PhotoCache | None = None


def train(
    spec: TrainSpec,
    out: Path,
    *,
    options: RunOptions | None = None,
    resume: bool = False,
    callbacks: Callbacks | None = None,
) -> RunResult:
    """Train as `spec` says and leave the run in the folder `out`.

    SIGINT and SIGTERM are taken note of (in the main thread) and stop the run where nothing is lost; a second Ctrl-C
    stops it at once.

    Args:
        spec: what to train on, and how.
        out: made if missing; refused if it holds a run already, unless `resume`, or if another run writes to it.
        options: how to carry it out; the result does not depend on it.
        resume: go on from the folder's checkpoint; a finished run is only evaluated again.
        callbacks: what to tell while it goes.

    Raises:
        InputError: something in `spec` or `out` cannot be used; RunError: the loss is not finite, or the folder
            cannot be written or resumed; Interrupted: a signal came.
    """
    if spec.engine != "lab":
        raise InputError(
            f"engine is {spec.engine!r}, which trains in a process of its own: use the command `tinytl train`, or "
            "`tinytl compile` and `python -m tinytl.runtime train`"
        )
    options, callbacks, out = options or RunOptions(), callbacks or Callbacks(), Path(out)
    with stop_on_signals() as stop, threads(options.threads):
        refuse_among(spec.photos, out)
        refuse_unless_free(out, resume)
        # all that can be refused is refused before anything is written
        prepared = prepare(spec, options, _all([lambda *_: stop.check(), callbacks.on_check]))
        if options.tensorboard:
            require_tensorboard()
        for note in (*prepared.train.notes, *prepared.validation.notes):
            callbacks.notice(note)
        stop.check()
        with made_folder(out), lock_folder(out, callbacks.notice):
            refuse_unless_free(out, resume)  # again: another run may have ended just now
            remove_temporaries(out / name for name in FILES)
            return _run(prepared, out, options, resume, callbacks, stop)


def _run(
    prepared: Prepared, out: Path, options: RunOptions, resume: bool, callbacks: Callbacks, stop: Stop
) -> RunResult:
    """Train and finish, in a folder that nobody else writes to."""
    spec, settings = prepared.spec, settings_of(prepared)
    cache = PhotoCache(options.cache_bytes) if options.cache_bytes else None
    training, validation = loaders(prepared, options.workers, cache, stop)
    checkpointer = Checkpointer(out / CHECKPOINT, prepared.model, prepared.adaptation, settings)
    at = checkpointer.load() if resume else None
    if checkpointer.notice:
        callbacks.notice(checkpointer.notice)
    if at is None:  # nothing is learned yet: what is written down is what is asked for now
        if spec.calibrate:
            calibrate(prepared, training)
        write_config(out / CONFIG, spec, options)
        write_bytes(out / SETTINGS, json.dumps(settings, indent=2).encode() + b"\n")
    stop.advice = f"the same command with --resume goes on from {out}"
    if callbacks.on_start is not None:
        callbacks.on_start(prepared)
    with _logs(out, at, resume, options.tensorboard) as logs:
        keeper = Keeper(checkpointer, options, stop, _all([log.sync for log in logs]))
        writes = [log.write for log in logs]
        with _kept_at_errors(keeper, checkpointer):
            result = fit(
                prepared.model,
                training,
                validation,
                prepared.fit,
                on_step=_all([keeper.moved, *writes, callbacks.on_step]),
                on_epoch=_all([*writes, callbacks.on_epoch]),
                on_boundary=keeper.boundary,
                resume=at,
            )
    final = result.validation or evaluate(prepared.model, validation, micro_batch=prepared.fit.micro_batch)
    save_delta(
        out / DELTA,
        prepared.model,
        prepared.adaptation,
        backbone=spec.backbone,
        norm=spec.norm,
        classes=prepared.train.classes,
        preprocessing=dataclasses.asdict(prepared.preprocessing),
        extra={
            "pretrained": spec.pretrained,
            "base_seed": spec.fit.seed,
            "frozen_bits": spec.frozen_bits,
            "codebook": spec.codebook,
        },
    )
    plot_curves(out / METRICS, out / CURVES)
    stop.advice = f"the run in {out} is finished"
    if options.report:
        stop.advice += f"; tinytl report {out} writes the page on it"
        write_page(out / PAGE, page_of(prepared, options, validation, out))
    return RunResult(out, prepared, result, final, (out / DELTA).stat().st_size, cache)


@contextlib.contextmanager
def _logs(out: Path, at: Resume | None, resume: bool, tensorboard: bool) -> Iterator[list[Any]]:
    """Where metrics are written, each cut off where the run goes on from."""
    with contextlib.ExitStack() as stack:
        progress = at.progress if at is not None else None
        logs: list[Any] = [stack.enter_context(MetricsLog(out / METRICS, progress))]
        if tensorboard:
            # event files are added to, never emptied: a run that begins anew hides what was there
            hidden = progress or (Progress() if resume else None)
            logs.append(stack.enter_context(contextlib.closing(TensorBoardLog(out / "tensorboard", hidden))))
        yield logs


@contextlib.contextmanager
def _kept_at_errors(keeper: Keeper, checkpointer: Checkpointer) -> Iterator[None]:
    """Where the block raises what is raised at a step boundary or before a step, save the state there and say so."""
    try:
        yield
    except Interrupted:
        keeper.keep()  # and if that fails, it is what there is to tell
        raise
    except TinyTLError as error:
        with contextlib.suppress(RunError):  # what stopped the run is what there is to tell
            keeper.keep()
        if isinstance(error, NotFiniteError | DataError) and checkpointer.saved_step is not None:
            error.args = (f"{error}; the state after step {checkpointer.saved_step} is in {checkpointer.path}",)
        raise


def _all(hooks: list[Callable[..., object] | None]) -> Callable[..., None]:
    """One hook that calls those that there are, in order."""

    def call(*values: Any) -> None:
        for hook in hooks:
            if hook is not None:
                hook(*values)

    return call
