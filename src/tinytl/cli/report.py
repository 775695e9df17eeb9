"""`tinytl report`: a finished run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .infer import Threads, Weights
from .output import AsJson, Quiet, print_json, print_line, print_note


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="File of the page; by default report.html in the run's folder.")
    ] = None,
    photos: Annotated[str | None, typer.Option(help="Where the run's photographs are, if not where they were.")] = None,
    weights: Weights = None,
    workers: Annotated[int, typer.Option(help="Threads that decode photographs.")] = 2,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a page on a run: memory, curves, confusion matrix, worst mistakes; one HTML file that needs no network."""
    from tinytl._run_page import report_run
    from tinytl._threads import threads as with_threads
    from tinytl.report import evaluation_record

    with with_threads(threads):
        done = report_run(run, out, photos=photos, weights=weights, workers=workers)
    if as_json:
        record = evaluation_record(done.evaluation)
        print_json({"page": str(done.path), "page_bytes": done.page_bytes, **record, "notes": list(done.notes)})
        return
    if not quiet:
        for note in done.notes:
            print_note(note)
    print_line(f"{done.path}: {done.page_bytes / 1e6:.2f} MB; open it in a browser")
