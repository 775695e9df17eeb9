"""`tinytl evaluate` and `tinytl predict`: use a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import completion
from .output import AsJson, Quiet, print_json, print_line, print_note

Run = Annotated[Path, typer.Argument(help="A run's folder, or a delta file.", show_default=False)]
Weights = Annotated[Path | None, typer.Option(help="Weights file of the backbone, if it cannot be found.")]
Threads = Annotated[int | None, typer.Option(help="Threads that compute; by default as many as PyTorch takes.")]

Strict = Annotated[bool, typer.Option("--strict", help="Refuse photographs that cannot be read.")]


def evaluate(
    run: Run,
    photos: Annotated[
        str,
        typer.Argument(
            help="Folder ROOT/CLASS/*.jpg (of one with splits, its val/ or test/), or a data set.",
            show_default=False,
            autocompletion=completion.names(*completion.DATASETS),
        ),
    ],
    weights: Weights = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    workers: Annotated[int, typer.Option(help="Threads that decode photographs.")] = 2,
    threads: Threads = None,
    strict: Strict = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a run's accuracy on photographs; give it some that it has not seen."""
    from tinytl._threads import threads as with_threads
    from tinytl.report import Column, evaluation_record, table
    from tinytl.trained import open_run, photos_for

    opened = open_run(run, weights=weights)
    chosen = photos_for(opened, photos, strict=strict, workers=workers)
    notes = [*chosen.notes, *opened.notes_on(photos)]
    if not (quiet or as_json):
        for note in notes:
            print_note(note)
    with with_threads(threads):
        found = opened.evaluate(chosen, batch_size=batch_size, workers=workers)
    record = evaluation_record(found, confusion=as_json)
    if as_json:
        print_json({**record, "classes": list(opened.classes), "notes": notes})
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
    images: Annotated[list[Path], typer.Argument(help="Photographs, or folders of some.", show_default=False)],
    weights: Weights = None,
    top: Annotated[int, typer.Option(help="Labels to show of each.")] = 3,
    strict: Strict = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Label photographs, with probabilities."""
    from tinytl._threads import threads as with_threads
    from tinytl.errors import DataError, InputError
    from tinytl.trained import open_run

    if top < 1:
        raise InputError(f"top is {top}, expected a whole number of at least 1")
    opened = open_run(run, weights=weights)
    with with_threads(threads):
        found = opened.label(images, top, strict=strict)
    if as_json:
        print_json(list(found.answers))
    else:
        for note in found.notes:
            print_note(note)
        for answer in found.answers:
            if "labels" in answer:
                labels = "  ".join(f"{label['label']} {label['probability']:.1%}" for label in answer["labels"])
                print_line(f"{answer['image']}: {labels}")
    if found.bad:  # the others are labelled; the exit status tells that not all are
        first, *others = found.bad
        raise DataError(f"{first} (and {len(others)} more)" if others else str(first))
