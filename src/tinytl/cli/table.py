"""`tinytl table`: the paper's table of memory, beside what is planned and what is measured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tinytl.spec import NORMS

from . import completion
from .output import AsJson, Quiet, print_json, print_line

if TYPE_CHECKING:  # these import torch; --help answers at once
    from tinytl.report import Column

PAGE, DATA = "table.md", "table.json"
LEGEND = (
    "published: the paper's tables 2 and 3; counted: by its rule, weights (frozen ones at 8 bits) and activations",
    "no lite: counted without lite residual modules, which the paper had in every row of its table 2",
    "planned, measured: all that is alive at the worst instant; gradients, optimizer state and input are in it",
    "stock: the same step measured in plain PyTorch, in the memory layout with the lower peak",
)


def table(
    backbone: Annotated[
        str, typer.Option(help="See `tinytl backbones`.", autocompletion=completion.names(*completion.BACKBONES))
    ] = "proxylessnas_mobile",
    norm: Annotated[str, typer.Option(help="bn or gn.", autocompletion=completion.names(*NORMS))] = "bn",
    resolution: Annotated[int | None, typer.Option(help="Pixels a side of every row; by default the paper's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 8,
    micro_batch: Annotated[int | None, typer.Option(help="Images at a time.")] = None,
    classes: Annotated[int, typer.Option(help="Outputs of the classifier.")] = 102,
    frozen_bits: Annotated[int, typer.Option(help="Of the frozen weights: 32, 16 or 8.")] = 32,
    codebook: Annotated[bool, typer.Option("--codebook", help="With 8: a table of 256 values a layer.")] = False,
    optimizer_bits: Annotated[int, typer.Option(help="Of Adam's state: 32 or 8.")] = 32,
    measure: Annotated[bool, typer.Option(help="Take the steps; else count and plan only.")] = True,
    stock: Annotated[bool, typer.Option(help="Take them in plain PyTorch too.")] = True,
    threads: Annotated[int | None, typer.Option(help="Threads that compute.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help=f"Also write {PAGE} and {DATA} into this folder.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print the paper's table of memory: published, counted, planned and measured, for every method."""
    from tinytl.memory.step import StepSpec
    from tinytl.memory.table import METHODS, table_row, table_steps
    from tinytl.report import table as draw

    base = StepSpec(
        backbone=backbone,
        method=METHODS[0],
        norm=norm,  # pyright: ignore[reportArgumentType]  (load refuses other names)
        batch_size=batch_size,
        micro_batch=micro_batch,
        classes=classes,
        frozen_bits=frozen_bits,
        codebook=codebook,
        optimizer_bits=optimizer_bits,
        threads=threads,
    )
    steps = table_steps(base, resolution)
    if out is not None:
        _make(out)
    rows = []
    with _progress(len(steps), shown=not (quiet or as_json)) as advance:
        for step in steps:
            advance(f"{step.method}, {step.resolution} px")
            rows.append(table_row(step, measure=measure, stock=stock).to_json())
    if out is not None:
        _write(out, rows)
    if as_json:
        print_json(rows)
        return
    if not quiet:
        print_line(f"{heading(rows)}; in MB")
    Console().print(draw(in_megabytes(rows), columns(rows)))
    if not quiet:
        for line in LEGEND:
            print_line(line)
        if out is not None:
            print_line(f"written: {out / PAGE}, {out / DATA}")


def heading(rows: Sequence[dict[str, Any]]) -> str:
    """What all rows of a table have in common, in one line."""
    row = rows[0]
    pieces = f" as micro-batches of {row['micro_batch']}" if row["micro_batch"] else ""
    marked = " unless marked" if any("@" in row["method"] for row in rows) else ""
    about = [f"{row['backbone']} ({row['norm']})", f"{row['resolution']} px{marked}", f"{row['classes']} classes"]
    about.append(f"batch {row['batch_size']}{pieces}")
    levers = (("frozen_bits", "frozen weights"), ("optimizer_bits", "optimizer state"))
    about += [f"{what} at {row[key]} bits" for key, what in levers if row[key] != 32]
    return ", ".join(about)


def in_megabytes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `--json` with what is in bytes turned into MB: a unit in every cell would not fit a terminal."""
    return [
        {key: value / 1e6 if key.endswith("_bytes") and value is not None else value for key, value in row.items()}
        for row in rows
    ]


def columns(rows: Sequence[dict[str, Any]]) -> list[Column]:
    """The columns of a table of `in_megabytes` rows, without those that nothing stands in."""
    from tinytl.report import Column

    found = [
        Column("method", "method"),
        Column("published_mb", "published"),
        Column("counted_bytes", "counted"),
        Column("counted_without_lite_bytes", "no lite"),
        Column("planned_bytes", "planned"),
        Column("measured_bytes", "measured"),
        Column("stock_measured_bytes", "stock"),
    ]
    return [column for column in found if any(row[column.key] is not None for row in rows)]


@contextlib.contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Any]:
    """Show which row is being taken, on stderr; gives a function to call with the name of each when it begins."""
    console = Console(stderr=True, quiet=not shown)
    bar = Progress(
        *(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")),
        console=console,
        transient=True,
        auto_refresh=False,  # no thread: it would write while stderr is held back around a measured step
    )
    task = bar.add_task("", total=total, completed=-1, visible=False)

    def advance(name: str) -> None:
        bar.update(task, description=name, advance=1, visible=True)
        bar.refresh()

    if not console.is_terminal:  # into a file, a bar would leave one empty line
        yield advance
        return
    with bar:
        yield advance


def _make(folder: Path) -> None:
    from tinytl.errors import RunError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write into --out {str(folder)!r}: {error.strerror or error}") from error


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    import datetime

    import torch

    from tinytl._atomic import write_bytes
    from tinytl._machine import processor, usable_cores
    from tinytl.report import markdown

    machine = {
        "processor": processor()[0],
        "cores": usable_cores(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    page = (
        f"# Memory of one training step\n\nMade by `tinytl table`: {heading(rows)}; on "
        f"{machine['processor']} ({machine['vector']}), torch {machine['torch']}, {machine['date']}; in MB.\n\n"
        + markdown(in_megabytes(rows), columns(rows))
        + "\n"
        + "".join(f"- {line}\n" for line in LEGEND)
    )
    write_bytes(folder / DATA, (json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n").encode())
    write_bytes(folder / PAGE, page.encode())
