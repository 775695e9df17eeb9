"""`tinytl backbones` and `tinytl methods`: what there is to choose from."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from .output import AsJson, print_json, print_line


def backbones(as_json: AsJson = False) -> None:
    """List the backbones."""
    from tinytl.backbones import BACKBONES
    from tinytl.report import Column, table

    rows = [
        {
            "name": name,
            "resolution": entry.preprocessing.resolution,
            **dataclasses.asdict(entry.complexity()),
            "norms": ", ".join(entry.weights_norms),
            "weights": entry.weights_from,
            "summary": entry.summary,
        }
        for name, entry in BACKBONES.items()
    ]
    if as_json:
        print_json(rows)
        return
    columns = [Column("name", "backbone"), Column("resolution", "px"), Column("parameters", "parameters")]
    columns += [Column("multiply_adds", "multiply-adds"), Column("summary", "what it is")]
    Console().print(table(rows, columns))


def methods(as_json: AsJson = False) -> None:
    """List the fine-tuning methods."""
    from tinytl.methods import DESCRIPTIONS, METHODS, PART_FORMS
    from tinytl.report import Column, table

    rows = [
        {"name": name, "trains": DESCRIPTIONS[name], "parts": [type(part).__name__ for part in method.parts]}
        for name, method in METHODS.items()
    ]
    if as_json:
        print_json(rows)
        return
    Console().print(table(rows, [Column("name", "method"), Column("trains", "what trains")]))
    print_line("Each also takes --last-blocks K: the last K blocks, and all behind them, train in full.")
    print_line("A method can also be spelled by its parts, or a name and parts, with + between:")
    for form in PART_FORMS.values():
        print_line(f"  {form}")
    print_line("Blocks are numbered from 0 in forward order: bias(10-13)+lite(10:k5g2.12:k3g2w50).")
