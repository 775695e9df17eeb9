"""`tinytl evaluate` and `tinytl predict`: use a finished run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Run = Annotated[Path, typer.Argument(help="A run's folder, or a delta file.")]
Weights = Annotated[Path | None, typer.Option(help="Weights file of the backbone, if it cannot be found.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def evaluate(
    run: Run,
    photos: Annotated[str, typer.Argument(help="Folder ROOT/CLASS/*.jpg (or its val/ or test/), or a data set.")],
    weights: Weights = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    workers: Annotated[int, typer.Option(help="Threads that decode photographs.")] = 2,
    threads: Annotated[int | None, typer.Option(help="Threads that compute.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run's accuracy on photographs; give it some that it has not seen."""
    from tinytl._threads import threads as with_threads
    from tinytl.report import Column, evaluation_record, table
    from tinytl.trained import open_run, photos_for

    opened = open_run(run, weights=weights)
    chosen = photos_for(opened, photos)
    for note in (*chosen.notes, *opened.notes_on(photos)):
        print(f"note: {note}", file=sys.stderr)
    with with_threads(threads):
        found = opened.evaluate(chosen, batch_size=batch_size, workers=workers)
    record = evaluation_record(found, confusion=as_json)
    if as_json:
        print(json.dumps({**record, "classes": list(opened.classes)}))
        return
    columns = [
        Column("images", "photographs"),
        Column("top1", "top-1", "%"),
        Column("balanced_accuracy", "balanced accuracy", "%"),
        Column("majority_share", "largest class alone", "%"),
        Column("loss", "loss [nats]", digits=3),
    ]
    Console().print(table([record], columns))


def predict(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Photographs.")],
    weights: Weights = None,
    top: Annotated[int, typer.Option(help="Labels to show of each.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Label photographs, with probabilities."""
    from tinytl.errors import InputError
    from tinytl.trained import open_run

    if top < 1:
        raise InputError(f"--top {top}: expected 1 or more")
    opened = open_run(run, weights=weights)
    answers = [{"image": str(path), "labels": opened.predict(path, top)} for path in images]
    if as_json:
        print(json.dumps(answers))
        return
    for answer in answers:
        labels = "  ".join(f"{label['label']} {label['probability']:.1%}" for label in answer["labels"])
        print(f"{answer['image']}: {labels}")
