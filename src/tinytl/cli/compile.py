"""`tinytl compile`: a training step as one file, for an executor that needs no PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tinytl.config import GROUPS, read_config, settings
from tinytl.errors import InputError
from tinytl.spec import FitOptions, RunOptions, TrainSpec

from . import completion
from .options import with_options
from .output import AsJson, Quiet, print_json, print_line, print_note

OF_THE_LAB = ("photos", "engine")
COMPILED = (
    *(entry.name for kind in (TrainSpec, FitOptions) for entry in GROUPS[kind] if entry.name not in OF_THE_LAB),
    *("workers", "threads", "strict"),
)


@with_options(*COMPILED)
def compile_command(
    given: dict[str, Any],
    run_or_spec: Annotated[
        str | None,
        typer.Argument(
            help="A finished run or its delta; a config.toml as `tinytl train --config` takes; or the photographs.",
            show_default=False,
            autocompletion=completion.names(*completion.DATASETS),
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the program.")] = Path("program.ttl"),
    classes: Annotated[
        str | None, typer.Option(help="Without photographs: how many classes, or their names (cat,dog).")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compile a training step, with its weights, into one file that `python -m tinytl.runtime` trains.

    Options are those of `tinytl train`; the budget is of the arena and of the frozen weights together.
    """
    from tinytl.compiler.compile import (
        NO_PHOTOS,
        THREADS,
        class_names,
        compile_classes,
        compile_run,
        compile_spec,
        is_run,
    )
    from tinytl.compiler.file import write_program

    if (run_or_spec is None) == (classes is None):
        what = "nothing is given" if classes is None else f"{run_or_spec!r} and --classes are given"
        raise InputError(
            f"{what} to compile for: give one, a run, a config.toml or photographs, or else --classes with a number"
        )
    if output.is_dir():
        raise InputError(f"{str(output)!r} is a folder: name the file, such as -o {output / 'program.ttl'}")
    of_run = {entry.name for entry in GROUPS[RunOptions]}
    threads = given.get("threads") or THREADS
    if classes is not None:
        names = class_names(classes)
        compiled = compile_classes(settings({**given, "photos": NO_PHOTOS})[0], names, threads=threads)
    elif run_or_spec is not None and is_run(run_or_spec):
        options = {name: value for name, value in given.items() if name not in of_run}
        compiled = compile_run(Path(run_or_spec), options, threads=threads)
    else:
        file = run_or_spec is not None and run_or_spec.endswith(".toml") and not os.path.isdir(run_or_spec)
        values = read_config(Path(str(run_or_spec))) if file else {"photos": run_or_spec}
        spec, options = settings({**values, **given})
        compiled = compile_spec(spec, options=options)
    digest = write_program(compiled.program, output)
    if as_json:
        print_json(_record(compiled, output, digest))
        return
    if not quiet:
        for note in compiled.notes:
            print_note(note)
        _print(compiled.program, output)
    print_line(f"{output}: {output.stat().st_size / 1e6:.2f} MB")


def _record(compiled: Any, output: Path, digest: str) -> dict[str, Any]:
    from tinytl.compiler.inspect import record

    return {
        "program": str(output),
        "file_bytes": output.stat().st_size,
        "sha256": digest,
        **record(compiled.program),
        "notes": list(compiled.notes),
    }


def _print(program: Any, output: Path) -> None:
    from tinytl.compiler.inspect import chosen_lines, role_rows, title
    from tinytl.report import Column, table

    console = Console()
    print_line(title(program), console)
    console.print(table(role_rows(program), [Column("role", "at the peak of a step"), Column("bytes", "MB", "MB", 2)]))
    for line in chosen_lines(program):
        print_line(line, console)
