"""The page on a run (`tinytl.report.page`): what it shows, gathered from the run's folder and its network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinytl._interrupt import stop_on_signals
from tinytl._options import Option, options_of
from tinytl._prepared import Prepared, loaders, prepare
from tinytl.config import FILE as CONFIG
from tinytl.config import read_config, settings
from tinytl.delta import apply_delta, load_delta
from tinytl.engine import BatchSource, Evaluation, make_optimizer
from tinytl.errors import DataError, RunError
from tinytl.memory import StepDescription, StepPlan, capture_step
from tinytl.report import Answers, Page, Setting, examine, read_metrics, write_page
from tinytl.spec import FitOptions, RunOptions, TrainSpec

DELTA, METRICS, RECORD, PAGE = "delta.safetensors", "metrics.jsonl", "run.json", "report.html"


@dataclass(frozen=True)
class RunReport:
    """A page that was written: where, its size, the evaluation that it shows, and what one should know."""

    path: Path
    page_bytes: int
    evaluation: Evaluation
    notes: tuple[str, ...]


def report_run(
    folder: Path,
    out: Path | None = None,
    *,
    photos: str | None = None,
    weights: Path | None = None,
    workers: int = 2,
) -> RunReport:
    """Write the page on a finished run; its held-out photographs are evaluated again.

    Args:
        folder: the run's.
        out: the page's file; by default `report.html` in the folder.
        photos: where the run's photographs are now, if not where they were.
        weights: the base network's weights, where they cannot be had otherwise.
        workers: threads that decode photographs.

    Raises:
        InputError: no finished run there; its photographs are not there, or other classes are; the base has other
            weights than the one it was trained on; the page cannot be written.
    """
    folder = Path(folder)
    if not (folder / DELTA).exists():
        raise RunError(
            f"{folder} holds no finished run: give a run's folder, or finish it with --resume --out {folder}"
        )
    delta = load_delta(folder / DELTA)
    spec, options = settings(read_config(folder / CONFIG) | ({} if photos is None else {"photos": photos}))
    if weights is not None:
        spec = replace(spec, weights=str(weights))
    with stop_on_signals() as stop:
        stop.advice = f"no page is written, and the run in {folder} is as it was"
        try:
            # a budget of the device is none of the lab's, whose step the page describes
            planned = replace(spec, memory_budget=None) if spec.engine == "device" else spec
            prepared = prepare(planned, replace(options, workers=workers), lambda *_: stop.check())
            prepared = replace(prepared, spec=spec)
        except DataError as error:
            raise DataError(f"{error}; if the photographs are elsewhere now, say where with --photos") from error
        if prepared.train.classes != delta.classes:
            raise DataError(
                f"{spec.photos!r} holds other classes than the {len(delta.classes)} that the run in {folder} was "
                "trained on: say where its photographs are with --photos"
            )
        apply_delta(prepared.model, delta, prepared.adaptation)
        page = page_of(prepared, options, loaders(prepared, workers, None, stop)[1], folder)
    path = folder / PAGE if out is None else Path(out)
    return RunReport(path, write_page(path, page), page.answers.evaluation, tuple(page.notes))


def page_of(prepared: Prepared, options: RunOptions, validation: BatchSource, folder: Path) -> Page:
    """What the page on a run shows.

    Args:
        prepared: with what was learned in its network.
        options: how the run was carried out.
        validation: the held-out photographs, in order.
        folder: the run's, which holds its delta and its metrics.
    """
    spec, adaptation, model = prepared.spec, prepared.adaptation, prepared.model
    answers = examine(model, validation, prepared.validation, micro_batch=prepared.fit.micro_batch)
    metrics = read_metrics(folder / METRICS)
    step = described(prepared)
    plan = [] if prepared.planned is None else prepared.planned.lines(spec.batch_size)
    return Page(
        title=f"{spec.backbone} on {spec.photos}",
        figures=_figures(prepared, answers, step, metrics, (folder / DELTA).stat().st_size),
        settings=_settings(spec, options),
        facts=[*adaptation.rows(), *(("memory budget", line) for line in plan)],
        notes=(*prepared.train.notes, *prepared.validation.notes, *_differences(prepared, folder)),
        step=step,
        blocks=adaptation.blocks,
        trained={name: p.numel() for name, p in model.named_parameters() if p.requires_grad},
        metrics=metrics,
        classes=prepared.train.classes,
        answers=answers,
    )


def described(prepared: Prepared) -> StepDescription:
    """One of the run's training steps, planned."""
    if prepared.planned is not None:
        return prepared.planned.step
    spec = prepared.spec
    size = prepared.preprocessing.resolution
    return capture_step(
        prepared.model,
        (spec.batch_size, 3, size, size),
        plan=StepPlan(spec.fit.micro_batch or spec.batch_size, spec.fit.update),
        optimizer=lambda parameters: make_optimizer(parameters, spec.fit),
        label_smoothing=spec.fit.label_smoothing,
        beside_bytes=2 * spec.batch_size * 3 * size * size,  # batches that the loader reads ahead
    )


def _figures(
    prepared: Prepared, answers: Answers, step: StepDescription, metrics: Sequence[Mapping[str, Any]], delta_bytes: int
) -> list[tuple[str, str, str]]:
    found, adaptation = answers.evaluation, prepared.adaptation
    rows = [
        ("Top-1", f"{found.top1:.1%}", f"of {found.images:,} held-out photographs"),
        ("Balanced accuracy", f"{found.balanced_accuracy:.1%}", f"largest class alone: {found.majority_share:.1%}"),
        (
            "Peak of a step",
            f"{step.peak_bytes / 1e6:,.1f} MB",
            f"planned, everything included; the step itself adds {step.step_peak_bytes / 1e6:,.1f} MB",
        ),
        (
            "Learned",
            f"{delta_bytes / 1e6:,.2f} MB",
            f"{adaptation.trained_elements:,} values train, {adaptation.frozen_elements:,} are frozen",
        ),
    ]
    epochs = [line for line in metrics if line["kind"] == "epoch"]
    seconds = sum(line.get("seconds", 0.0) + line.get("wait_seconds", 0.0) for line in epochs)
    images = sum(line.get("trained_images", 0) for line in epochs)
    if seconds:
        rows.append(("Training", _duration(seconds), f"{len(epochs)} epochs, {images / seconds:,.1f} images/s"))
    highest = max((line.get("peak_bytes") or 0 for line in epochs), default=0)
    if highest:
        rows.append(("Process", f"{highest / 1e6:,.0f} MB", "at its peak, everything included"))
    return rows


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _settings(spec: TrainSpec, options: RunOptions) -> dict[str, list[Setting]]:
    owners = {
        "What was learned from what": (TrainSpec, spec),
        "How it was trained": (FitOptions, spec.fit),
        "How it was carried out": (RunOptions, options),
    }
    return {
        heading: [_setting(entry, getattr(owner, entry.name)) for entry in options_of(kind)]
        for heading, (kind, owner) in owners.items()
    }


def _setting(entry: Option, value: object) -> Setting:
    shown = "–" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    return Setting(entry.name.replace("_", " "), shown, value != entry.default)


def _differences(prepared: Prepared, folder: Path) -> list[str]:
    """A note where the held-out photographs are others than the run's, or where it is not known."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        same = record["validation_photos"] == prepared.validation.fingerprint()
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{folder / RECORD} cannot be read: whether the held-out photographs are the run's is not known"]
    return [] if same else ["photographs were added or removed since: those held out now are not those of the run"]
