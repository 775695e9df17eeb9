"""`tinytl bench device`: the compiled step beside stock PyTorch, on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from . import completion
from .output import AsJson, Quiet, print_json, print_line

app = typer.Typer(help="Benchmarks to run on one's own machine.")

LEGEND = (
    "process: the most that the stand-alone program, without Python, has resident; from Python: an epoch of",
    "python -m tinytl.runtime train; stock: a process with PyTorch that takes one step",
    "ratio: our step over stock PyTorch's of the same method, in its faster layout; FT-Full: over stock's of that",
    "of peak: multiply-adds of the step over what the machine's units reach at best",
)


@app.callback()
def _group() -> None:
    """Keep `device` a command of its own: a group of one command would be that command."""


@app.command("device")
def device(
    backbone: Annotated[
        str, typer.Option(help="See `tinytl backbones`.", autocompletion=completion.names(*completion.BACKBONES))
    ] = "proxylessnas_mobile",
    resolution: Annotated[int, typer.Option(help="Pixels a side.")] = 224,
    classes: Annotated[int, typer.Option(help="Outputs of the classifier.")] = 102,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 8,
    threads: Annotated[int, typer.Option(help="Threads of both sides.")] = 2,
    turns: Annotated[int, typer.Option(help="Steps of each side, taken in turns.")] = 15,
    stock: Annotated[bool, typer.Option(help="Compare with stock PyTorch.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compile TinyTL-B and L+B, run them beside stock PyTorch, and tell bytes, seconds and share of peak."""
    from tinytl._device_bench import device_rows
    from tinytl.memory import StepSpec
    from tinytl.report import table

    base = StepSpec(
        backbone=backbone,
        method="tinytl-b",
        resolution=resolution,
        classes=classes,
        batch_size=batch_size,
        threads=threads,
    )
    base.check()
    notes = Console(stderr=True)

    def show(text: str) -> None:
        if not (quiet or as_json):
            notes.print(text, markup=False, highlight=False)

    rows = device_rows(base, turns=turns, stock=stock, on_row=show)
    if as_json:
        print_json(rows)
        return
    Console().print(table(rows, columns()))
    if not quiet:
        for line in LEGEND:
            print_line(line)


def columns() -> list[Any]:
    """The table's columns, for the terminal and for the docs page."""
    from tinytl.report import Column

    return [
        Column("method", "method"),
        Column("norm", "norm"),
        Column("frozen_bits", "frozen bits"),
        Column("optimizer_bits", "Adam bits"),
        Column("micro_batch", "images at a time"),
        Column("process_budget_bytes", "allowed", "MB"),
        Column("peak_rss_bytes", "process", "MB"),
        Column("python_peak_rss_bytes", "from Python", "MB"),
        Column("stock_peak_rss_bytes", "stock process", "MB"),
        Column("arena_planned_bytes", "arena", "MB", 2),
        Column("arena_used_bytes", "used", "MB", 2),
        Column("step_seconds", "step", "ms"),
        Column("stock_step_seconds", "stock step", "ms"),
        Column("ratio", "ratio", "x", 2),
        Column("ratio_low", "quartile", "x", 2),
        Column("ratio_high", "quartile", "x", 2),
        Column("full_ratio", "over FT-Full", "x", 2),
        Column("gemm_peak_share", "of peak", "%", 0),
        Column("first_step_seconds", "file to first step", "ms", 0),
    ]
