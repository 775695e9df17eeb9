"""`tinytl inspect`: what a compiled program holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .output import AsJson, print_json, print_line


def inspect_command(
    program: Annotated[Path, typer.Argument(help="A compiled program.", show_default=False)],
    instructions: Annotated[
        bool, typer.Option("--instructions", help="Also list every instruction, and in JSON every tensor.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the arena into this PNG: offset over instructions.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a compiled program is: operations, bytes by role, and the map of its arena."""
    from tinytl.compiler import inspect as words
    from tinytl.compiler.file import read_program
    from tinytl.report import Column, table

    found = read_program(program)
    if picture is not None:
        from tinytl.compiler.picture import draw_arena

        draw_arena(found, picture, title=words.title(found))
    if as_json:
        record = {"program": str(program), "file_bytes": program.stat().st_size, **words.record(found)}
        if instructions:
            record |= {"tensors": words.arena_map(found), "instruction_list": list(words.instruction_rows(found))}
        print_json(record)
        return
    console = Console()
    print_line(f"{program}: {program.stat().st_size / 1e6:.2f} MB", console)
    print_line(words.title(found), console)
    columns = [Column("role", "at the peak of a step"), Column("bytes", "MB", "MB", 2)]
    console.print(table(words.role_rows(found), columns))
    for line in words.chosen_lines(found):
        print_line(line, console)
    print_line("operations: " + ", ".join(f"{count} {op}" for op, count in words.operations(found).items()), console)
    if instructions:
        for row in words.instruction_rows(found):
            operands = " ".join(f"{name}={tensor}" for name, tensor in row["operands"].items())
            print_line(f"{row['at']:5} {row['stream']:8} {row['op']:18} {row['phase']:8} {operands}", console)
