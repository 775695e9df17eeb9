"""`tinytl train`: fine-tune on a folder of photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tinytl.config import FILE, OUT, read_config, settings

from .options import with_run_options
from .output import AsJson, Quiet, print_json, print_line, print_note

# torch and the rest of the library are imported inside the commands: --help answers at once


@with_run_options
def train(
    given: dict[str, Any],
    config: Annotated[str | None, typer.Option(help="Read options from a TOML file; those typed here win.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder --out.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a backbone on photographs and leave the run in a folder.

    A run's folder holds config.toml, every option of it: `--config RUN/config.toml --out OTHER` repeats the run, and
    `--resume --out RUN` goes on with it; neither needs any other option.
    """
    quiet = quiet or as_json
    values = dict(given)
    out = Path(values.get("out", OUT.default))
    own = out / FILE
    source = Path(config) if config is not None else own if resume and own.is_file() else None
    if source is not None:
        values = {**read_config(source), **given}
        out = Path(values.get("out", OUT.default))
        if config is None and not quiet:
            print_note(f"options that are not given are those of {own}")
    spec, options = settings(values)

    if spec.engine == "device":
        from tinytl._device_run import become, command, compiled_into

        program = compiled_into(spec, out, options, resume, (lambda _: None) if quiet else print_note)
        become(command(spec, out, program, options, resume=resume, as_json=as_json, quiet=quiet))

    from tinytl.run import train as run_train

    from .display import TrainingDisplay, result_record, summary

    with TrainingDisplay(Console(quiet=quiet), quiet=quiet) as display:
        result = run_train(spec, out, options=options, resume=resume, callbacks=display.callbacks())
    if as_json:
        print_json(result_record(result, display.notes))
        return
    for line in summary(result):
        print_line(line)
