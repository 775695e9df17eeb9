"""`tinytl search`: choose the network that suits the photographs and the memory, and train it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import TaskID
from rich.table import Table

from tinytl._options import Option, options_of
from tinytl.errors import InputError
from tinytl.search.spec import SearchOptions, SearchSpec

from .display import TrainingDisplay, progress_bars
from .options import with_options
from .output import AsJson, Quiet, print_json, print_line

if TYPE_CHECKING:  # these import torch; --help answers at once
    from tinytl.search.archive import Candidate
    from tinytl.search.run import SearchCallbacks, SearchResult
    from tinytl.search.space import Space
    from tinytl.search.target import Target
    from tinytl.search.tuning import TuneInfo

_OUT = Option("out", "str", "runs/search", "Folder for the search.")
_SPEC, _CARRIED = options_of(SearchSpec), options_of(SearchOptions)
GROUPS = {"What is searched, and how": _SPEC, "How it is carried out": (*_CARRIED, _OUT)}


@with_options(groups=GROUPS)
def search(
    given: dict[str, Any],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in the folder --out.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose a sub-network for photographs within a memory budget, without back-propagation in the choice; train it.

    `tinytl train --backbone RUN`, with the search's folder, trains what was found again, and `tinytl compile` takes the
    winner's run in RUN/winner.
    """
    quiet = quiet or as_json
    out = Path(given.get("out", _OUT.default))
    values = {entry.name: given[entry.name] for entry in _SPEC if entry.name in given}
    if "photos" not in values:
        raise InputError("no photographs are given: tinytl search PHOTOS")
    spec = SearchSpec(**values)
    options = SearchOptions(**{entry.name: given[entry.name] for entry in _CARRIED if entry.name in given})

    from tinytl.search.run import search as run_search
    from tinytl.search.shown import draw, record

    with SearchDisplay(Console(quiet=quiet), quiet=quiet) as display:
        result = run_search(spec, out, options=options, resume=resume, callbacks=display.callbacks())
    pictures = draw(result, spec.budget_bytes)
    if as_json:
        print_json({**record(result), "pictures": [str(path) for path in pictures], "notes": display.notes})
        return
    if not quiet:
        show(result, Console())
    for line in summary(result, spec.budget_bytes):
        print_line(line)


class SearchDisplay:
    """A bar for each stage, and while evolution goes the front so far.

    Attributes:
        notes: what the search said that the user should know, also printed on stderr unless ``quiet``.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self._run = TrainingDisplay(console, quiet=quiet)
        self.notes = self._run.notes
        self._progress = progress_bars(console)
        self._tasks: dict[str, TaskID] = {}
        self._front: Table | None = None
        self._live = Live(console=console, transient=True, get_renderable=self._view)

    def __enter__(self) -> SearchDisplay:
        if self._console.is_terminal:  # into a file, a bar would leave one empty line
            self._live.start()
        return self

    def _view(self) -> RenderableType:
        return Group(*(part for part in (self._front, self._progress) if part is not None))

    def __exit__(self, *error: object) -> None:
        self._end()
        self._run.__exit__(*error)

    def callbacks(self) -> SearchCallbacks:
        """What `tinytl.search.run.search` is to call."""
        from dataclasses import replace

        from tinytl.search.run import SearchCallbacks

        of_run = self._run.callbacks()
        return SearchCallbacks(
            on_start=self.start,
            on_progress=self.progress,
            on_tune=self.tune,
            on_front=self.front,
            on_notice=self._run.notice,
            run=replace(of_run, on_start=self.winner),
        )

    def start(self, space: Space, target: Target) -> None:
        """Say what is searched on what."""
        sizes = ", ".join(map(str, space.resolutions))
        print_line(
            f"{space.architecture.base}: {len(space.genes)} choices, 10^{space.log10_size:.0f} networks, at {sizes} "
            f"px; {len(target.tune)} photographs to learn from, {len(target.held)} to choose by, "
            f"{len(target.classes)} classes",
            self._console,
        )

    def progress(self, stage: str, done: int, total: int) -> None:
        """Move a stage's bar."""
        self._move(stage, done, total, "")

    def tune(self, info: TuneInfo) -> None:
        """Move the bar of fine-tuning."""
        self._move("fine-tuning", info.step, info.steps, f"loss {info.loss:.3f} at {info.resolution} px")

    def front(self, candidates: tuple[Candidate, ...], space: Space) -> None:
        """Show what evolution has found so far."""
        self._front = front_table(candidates, space)

    def winner(self, prepared: Any) -> None:
        """The winner's own run begins: its display takes over."""
        self._end()
        self._run.__enter__()
        self._run.start(prepared)

    def _end(self) -> None:
        if self._live.is_started:
            self._live.stop()

    def _move(self, stage: str, done: int, total: int, figures: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, figures=figures)
        self._progress.update(self._tasks[stage], completed=done, total=total, figures=figures)


def front_table(candidates: tuple[Candidate, ...], space: Space) -> Table:
    """Some of a front, from the least memory to the most."""
    import numpy as np

    from tinytl.report import Column, table

    ordered = sorted(candidates, key=lambda candidate: candidate.planned.memory_bytes)
    some = [ordered[at] for at in np.unique(np.linspace(0, len(ordered) - 1, 8).astype(int))] if ordered else []
    rows: list[dict[str, object]] = [
        {
            "memory": candidate.planned.memory_bytes,
            "predicted": candidate.accuracy,
            "network": _short(space, candidate.genome),
        }
        for candidate in some
    ]
    columns = [Column("memory", "planned", "MB", 2), Column("predicted", "predicted", "%"), Column("network", "front")]
    return table(rows, columns)


def show(result: SearchResult, console: Console) -> None:
    """The front, the finalists, and what time went to, as tables."""
    from tinytl.report import Column, table
    from tinytl.search.profile import COLUMNS

    console.print(front_table(result.front, result.space))
    rows: list[dict[str, object]] = [
        {
            "network": _short(result.space, finalist.genome) + (" (default)" if finalist.default else ""),
            "memory": finalist.cost.memory_bytes,
            "predicted": finalist.predicted,
            "shared": finalist.shared_top1,
            "trained": finalist.trained_top1,
        }
        for finalist in result.finalists
    ]
    columns = [
        Column("network", "finalists, best first"),
        Column("memory", "planned", "MB", 2),
        Column("predicted", "predicted", "%"),
        Column("shared", "super-network", "%"),
        Column("trained", "trained", "%"),
    ]
    console.print(table(rows, columns))
    console.print(table(result.profile.rows(), list(COLUMNS)))


def summary(result: SearchResult, budget_bytes: int) -> list[str]:
    """What was found, in a few lines."""
    choice = result.choice
    lines = [
        f"found: {choice.backbone} at {choice.resolution} px, method {choice.method}",
        f"planned {result.cost.memory_bytes / 1e6:.2f} MB of {budget_bytes / 1e6:.2f} MB; predictor's Kendall tau "
        f"{result.tau:.2f} on sub-networks that it has not seen; {result.profile.evaluation_share:.0%} of the search's "
        "time in evaluation",
    ]
    if result.run is not None:
        e = result.run.evaluation
        lines.append(
            f"trained: top-1 {e.top1:.1%}, balanced {e.balanced_accuracy:.1%} on {e.images} photographs that no choice "
            f"has seen; in {result.run.out}"
        )
    return lines


def _short(space: Space, genome: tuple[int, ...]) -> str:
    """A network in a few words."""
    import numpy as np

    found = np.array(genome)
    blocks, lite, biases = len(space.active(found)), len(space.lite(found)), len(space.biases(found))
    return f"{space.resolution(found)} px, {blocks} blocks, {lite} lite modules, biases of {biases}"
