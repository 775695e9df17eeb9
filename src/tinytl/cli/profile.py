"""`tinytl profile`: where the bytes of one training step go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tinytl._found import resolved
from tinytl.spec import NORMS

from . import completion
from .output import AsJson, print_json

METHOD, RESOLUTION, NORM = "tinytl-l+b", 224, "bn"


def profile(
    backbone: Annotated[
        str, typer.Option(help="See `tinytl backbones`.", autocompletion=completion.names(*completion.BACKBONES))
    ] = "proxylessnas_mobile",
    method: Annotated[
        str,
        typer.Option(
            help="A name, or parts with + between; see `tinytl methods`.",
            autocompletion=completion.names(*completion.METHODS),
        ),
    ] = METHOD,
    resolution: Annotated[int, typer.Option(help="Pixels a side.")] = RESOLUTION,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 8,
    micro_batch: Annotated[int | None, typer.Option(help="Images at a time.")] = None,
    classes: Annotated[int, typer.Option(help="Outputs of the classifier.")] = 102,
    norm: Annotated[str, typer.Option(help="bn or gn.", autocompletion=completion.names(*NORMS))] = NORM,
    last_blocks: Annotated[int, typer.Option(help="Also train the last K blocks in full.")] = 0,
    frozen_bits: Annotated[int, typer.Option(help="Of the frozen weights: 32, 16 or 8.")] = 32,
    codebook: Annotated[
        bool, typer.Option("--codebook", help="With 8 frozen bits: a table of 256 values a layer.")
    ] = False,
    optimizer: Annotated[str, typer.Option(help="adam or sgd.")] = "adam",
    optimizer_bits: Annotated[int, typer.Option(help="Of the optimizer's state: 32 or 8.")] = 32,
    update: Annotated[str, typer.Option(help="end, or backward.")] = "end",
    memory_budget: Annotated[
        str | None, typer.Option(help="Most live bytes, such as 48MB: the fastest plan that fits is taken.")
    ] = None,
    compare: Annotated[str | None, typer.Option(help="`stock`: the same step in plain PyTorch too.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed steps; 0: none.")] = 5,
    rss: Annotated[bool, typer.Option(help="Start fresh processes to read the resident set.")] = True,
    threads: Annotated[int | None, typer.Option(help="Threads that compute.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also show what each layer keeps.")] = False,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Also show each block's memory, and what the peak is.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the planned step's live bytes into this PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Profile one training step: counted, kept and measured memory, and its time."""
    from tinytl.errors import InputError, UnknownNameError
    from tinytl.memory import StepSpec, profile_step

    if compare not in (None, "stock"):
        raise UnknownNameError("comparison", compare, ("stock",))
    if repeats < 0:
        raise InputError(f"--repeats {repeats}: expected 0 or more")
    # a search's folder brings what is not given beside it
    brought = resolved({"backbone": backbone})
    if brought["backbone"] != backbone:
        backbone = brought["backbone"]
        method = brought["method"] if method == METHOD else method
        resolution = brought["resolution"] if resolution == RESOLUTION else resolution
        norm = brought["norm"] if norm == NORM else norm
    spec = StepSpec(
        backbone=backbone,
        method=method,
        norm=norm,  # pyright: ignore[reportArgumentType]  (load refuses other names)
        resolution=resolution,
        batch_size=batch_size,
        micro_batch=micro_batch,
        classes=classes,
        last_blocks=last_blocks,
        threads=threads,
        frozen_bits=frozen_bits,
        codebook=codebook,
        optimizer=optimizer,
        optimizer_bits=optimizer_bits,
        update=update,
        memory_budget=memory_budget,
    )
    found = profile_step(spec, compare_stock=compare == "stock", repeats=repeats, rss=rss)
    if picture is not None:
        from tinytl.memory.timeline import draw_planned

        draw_planned(
            found.planned.step, picture, title=f"{spec.backbone} ({spec.norm}), {found.adaptation.method.name}"
        )
    if as_json:
        print_json(found.to_json())
        return
    _print(found, layers)
    if blocks:
        from tinytl.report import print_blocks

        print_blocks(found.planned.step, found.adaptation.blocks, Console())


def _print(found: Any, layers: bool) -> None:
    from tinytl.report import Column, table

    spec, console = found.spec, Console()
    console.print(
        f"{spec.backbone} ({spec.norm}), {found.adaptation.method.name}, {spec.resolution} px, batch {spec.batch_size}"
        + (f" as micro-batches of {spec.micro_batch}" if spec.micro_batch else "")
        + f", {spec.classes} classes"
    )
    rows = [
        {"what": "counted by the paper's rule", "lean": found.counted.total_bytes, "stock": None},
        {"what": "kept for backward, by the operations' rules", "lean": found.kept.total_bytes, "stock": None},
    ]
    rows.append({"what": "planned: all live tensors, at the peak", "lean": found.planned.peak_bytes, "stock": None})
    lean, stock = found.lean, found.stock
    for what, figure in (
        ("measured: what the step adds, at its peak", lambda f: f.measured.step_peak_bytes),
        ("measured: all live tensors, at the peak", lambda f: f.measured.peak_bytes),
        ("measured: growth of a fresh process", lambda f: f.rss_delta_bytes),
    ):
        rows.append({"what": what, "lean": figure(lean), "stock": None if stock is None else figure(stock)})
    columns = [Column("what", "memory"), Column("lean", "lean", "MB", 2)]
    columns += [] if stock is None else [Column("stock", "stock PyTorch", "MB", 2)]
    console.print(table(rows, columns))
    for line in found.planned.lines(spec.batch_size):
        console.print(line)
    for name, figures in (("lean", lean), ("stock", stock)):
        if figures is not None and figures.step_seconds is not None and figures.spread is not None:
            low, high = figures.spread
            console.print(
                f"{name}: {figures.step_seconds * 1e3:.0f} ms a step "
                f"({low * 1e3:.0f} to {high * 1e3:.0f}), {figures.layout}"
            )
    if not found.compiled:
        console.print("The compiled passes are missing: build with a C++ compiler to be faster (same results).")
    if layers:
        entries = [{"layer": e.layer, "what": e.what, "bytes": e.bytes} for e in found.kept.entries]
        console.print(
            table(entries, [Column("layer", "layer"), Column("what", "keeps"), Column("bytes", "MB", "MB", 3)])
        )
