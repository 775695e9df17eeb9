"""`tinytl backbones` and `tinytl methods`: what there is to choose from."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def backbones(as_json: AsJson = False) -> None:
    """List the backbones."""
    from tinytl.backbones import BACKBONES
    from tinytl.report import Column, table

    rows = [
        {
            "name": name,
            "resolution": entry.preprocessing.resolution,
            "norms": ", ".join(entry.weights_norms),
            "weights": "pip package or download" if entry.source else "--weights FILE",
            "summary": entry.summary,
        }
        for name, entry in BACKBONES.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = [Column("name", "backbone"), Column("resolution", "px"), Column("norms", "norm")]
    columns.append(Column("summary", "what it is"))
    Console().print(table(rows, columns))


def methods(as_json: AsJson = False) -> None:
    """List the fine-tuning methods."""
    from tinytl.methods import DESCRIPTIONS, METHODS
    from tinytl.report import Column, table

    rows = [
        {"name": name, "trains": DESCRIPTIONS[name], "parts": [type(part).__name__ for part in method.parts]}
        for name, method in METHODS.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    console = Console()
    console.print(table(rows, [Column("name", "method"), Column("trains", "what trains")]))
    console.print("Each also takes --last-blocks K: the last K blocks, and all behind them, train in full.")
