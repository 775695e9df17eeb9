"""`tinytl supernet`: train a once-for-all super-network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import TaskID

from tinytl._options import Option, options_of
from tinytl.spec import RunOptions
from tinytl.supernet.spec import DEFAULT_OUT, SupernetSpec

from .display import progress_bars
from .options import with_options
from .output import AsJson, Quiet, print_json, print_line, print_note

if TYPE_CHECKING:  # these import torch; --help answers at once
    from tinytl.engine import StepInfo
    from tinytl.supernet.loop import PhaseInfo
    from tinytl.supernet.run import SupernetCallbacks, SupernetResult
    from tinytl.supernet.setup import PreparedSupernet

CARRIED_OUT = ("workers", "threads", "checkpoint_steps", "checkpoint_seconds", "cache", "strict")
_OUT = Option("out", "str", DEFAULT_OUT, "Folder for the super-network.")
_RUN = tuple(entry for entry in options_of(RunOptions) if entry.name in CARRIED_OUT)
GROUPS = {"What is trained, and how": options_of(SupernetSpec), "How it is carried out": (*_RUN, _OUT)}


@with_options(groups=GROUPS)
def supernet(
    given: dict[str, Any],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder --out.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a once-for-all super-network on photographs, by progressive shrinking.

    Its file, RUN/supernet.safetensors, is a --weights file for every sub-network of the space. With several processes:
    torchrun --nproc-per-node 2 -m tinytl supernet PHOTOS ...
    """
    quiet = quiet or as_json or os.environ.get("RANK", "0") != "0"  # of several processes the first one tells
    carried = {name: value for name, value in given.items() if name in CARRIED_OUT}
    out = Path(given.get("out", DEFAULT_OUT))
    asked = {name: value for name, value in given.items() if name not in CARRIED_OUT and name != "out"}
    if "photos" not in asked:
        from tinytl.errors import InputError

        raise InputError("no photographs: give a folder that holds a folder for each class, or the name of a data set")
    spec, options = SupernetSpec(**asked), RunOptions(**carried)

    from tinytl.supernet.run import train_supernet

    with SupernetDisplay(Console(quiet=quiet), quiet=quiet) as display:
        result = train_supernet(spec, out, options=options, resume=resume, callbacks=display.callbacks())
    if not result.is_first:
        return
    if as_json:
        print_json(result_record(result, display.notes))
        return
    from tinytl.report import table

    Console().print(table(_rows(result), _columns()))
    prepared = result.prepared
    print_line(
        f"{prepared.space.name} after {result.steps} steps, on {len(prepared.validation)} held-out photographs at "
        f"{prepared.preprocessing.resolution} px; in {out}"
    )


class SupernetDisplay:
    """A progress bar with phase and loss, and a line for each phase.

    Attributes:
        notes: what the run said that the user should know, also printed on stderr unless ``quiet``.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.notes: list[str] = []
        self._console, self._quiet = console, quiet
        self._progress = progress_bars(console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> SupernetDisplay:
        if self._console.is_terminal:  # into a file, a bar would leave one empty line
            self._progress.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def callbacks(self) -> SupernetCallbacks:
        """What `tinytl.supernet.run.train_supernet` is to call."""
        from tinytl.supernet.run import SupernetCallbacks

        return SupernetCallbacks(
            on_start=self.start,
            on_step=self.step,
            on_phase=self.phase,
            on_notice=self.notice,
            on_check=lambda done, total: self._bar("checking photographs", done, total, hide=done == total),
            on_measured=lambda done, total: self._bar("measuring sub-networks", done, total),
        )

    def start(self, prepared: PreparedSupernet) -> None:
        """Say what trains on what."""
        sizes = ", ".join(map(str, prepared.spec.sizes))
        print_line(
            f"{prepared.space.name} on {len(prepared.train)} photographs of {len(prepared.train.classes)} classes, "
            f"{len(prepared.validation)} held out, at {sizes} px",
            self._console,
        )
        course = ", ".join(f"{phase.name} ({phase.epochs})" for phase in prepared.phases)
        print_line(f"phases (epochs): {course}", self._console)

    def step(self, info: StepInfo, phase: str) -> None:
        """Move the bar."""
        figures = f"{phase}  loss {info.loss:.3f}  {info.images_per_second:.0f} images/s"
        self._bar("training", info.step, info.steps, figures)

    def phase(self, info: PhaseInfo) -> None:
        """Print one line."""
        found = ", ".join(f"{entry.name.partition(' ')[0]} {entry.evaluation.top1:.1%}" for entry in info.results)
        print_line(
            f"{info.phase}: epoch {info.epoch}/{info.epochs}  loss {info.loss:.3f}  training {info.accuracy:.1%}  "
            f"held out: {found}",
            self._console,
        )

    def notice(self, text: str) -> None:
        """Print what the user should know."""
        self.notes.append(text)
        if not self._quiet:
            print_note(text)

    def _bar(self, name: str, done: int, total: int, figures: str = "", hide: bool = False) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, figures=figures)
        self._progress.update(self._tasks[name], completed=done, total=total, figures=figures, visible=not hide)


def result_record(result: SupernetResult, notes: list[str]) -> dict[str, Any]:
    """A finished run as `tinytl supernet --json` prints it: fractions and counts."""
    return {
        "out": str(result.out),
        "space": result.prepared.space.name,
        "classes": list(result.prepared.train.classes),
        "train_images": len(result.prepared.train),
        "resolution": result.prepared.preprocessing.resolution,
        "steps": result.steps,
        "processes": result.prepared.processes,
        "subnets": [entry.record() for entry in result.subnets],
        "notes": notes,
    }


def _rows(result: SupernetResult) -> list[dict[str, Any]]:
    return [entry.record() for entry in result.subnets]


def _columns() -> list[Any]:
    from tinytl.report import Column

    return [
        Column("name", "sub-network"),
        Column("architecture", "architecture"),
        Column("top1", "top-1", "%"),
        Column("balanced_accuracy", "balanced", "%"),
        Column("parameters", "parameters"),
        Column("multiply_adds", "multiply-adds"),
    ]
