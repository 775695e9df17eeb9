"""`tinytl train --engine device`: compile here, with PyTorch; then become the process that trains, without it.

The program goes into the run's folder, beside `config.toml`, and the rest of the run is that of
`python -m tinytl.runtime train`: this process is replaced by it (`exec`), so nothing of PyTorch stays in memory, a
signal reaches the one that trains, and its exit status is the command's.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tinytl._differences import differences
from tinytl._files import remove_temporaries
from tinytl._interrupt import stop_on_signals
from tinytl._lock import lock_folder
from tinytl._run_folder import made_folder, refuse_unless_free
from tinytl.config import FILE as CONFIG
from tinytl.config import read_config, settings, write_config
from tinytl.data import refuse_among
from tinytl.errors import InputError, RunError
from tinytl.runtime._library import library
from tinytl.spec import RunOptions, TrainSpec

PROGRAM = "program.ttl"
OF_THE_LAB = ("workers", "cache", "tensorboard", "report")
"""Fields of `RunOptions` that the device has nothing for."""
PASSED = ("val_fraction", "split_seed", "min_scale")
PASSED_OF_FIT = ("epochs", "lr", "warmup_epochs", "seed")


def compiled_into(
    spec: TrainSpec, out: Path, options: RunOptions, resume: bool, notice: Callable[[str], object]
) -> Path:
    """Compile what is asked for into the run's folder, unless it is resumed and has its program; return the program.

    Raises:
        InputError: an option that only the lab has, no executor to train with, or anything that cannot be compiled;
            RunError: the folder holds a run, cannot be written, or was begun with another specification.
    """
    library()  # what will train has to be there before anything is compiled and left
    _refuse_options(options)
    refuse_among(spec.photos, out)
    refuse_unless_free(out, resume)
    program = out / PROGRAM
    if resume and (out / CONFIG).exists():
        _refuse_other(spec, out)
        if program.exists():
            return program
    from tinytl.compiler.compile import compile_spec
    from tinytl.compiler.file import write_program

    with stop_on_signals() as stop:
        stop.advice = f"nothing is in {out} yet"
        notice(f"compiling {spec.method} of {spec.backbone}")
        compiled = compile_spec(spec, options=options)
        stop.check()
        with made_folder(out), lock_folder(out, notice):
            refuse_unless_free(out, resume)  # again: another run may have ended just now
            remove_temporaries((program, out / CONFIG))
            write_program(compiled.program, program)
            write_config(out / CONFIG, spec, options)
    return program


def command(
    spec: TrainSpec, out: Path, program: Path, options: RunOptions, *, resume: bool, as_json: bool, quiet: bool
) -> list[str]:
    """The words of the process that trains."""
    words = [sys.executable, "-m", "tinytl.runtime", "train", f"--out={out}"]
    values = {name: getattr(spec, name) for name in PASSED} | {name: getattr(spec.fit, name) for name in PASSED_OF_FIT}
    values |= {"threads": options.threads, "checkpoint_steps": options.checkpoint_steps}
    values |= {"checkpoint_seconds": options.checkpoint_seconds or "none"}
    for name, value in values.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}={value}"]
    for name in ("flip", "color"):
        words.append(f"--{'' if getattr(spec, name) else 'no-'}{name}")
    flags = {"resume": resume, "strict": options.strict, "json": as_json, "quiet": quiet}
    words += [f"--{name}" for name, given in flags.items() if given]
    return [*words, "--", str(program), spec.photos]  # neither is an option, whatever it begins with


def become(words: Sequence[str]) -> NoReturn:
    """Replace this process by another; its output so far is written out first."""
    sys.stdout.flush()
    sys.stderr.flush()
    # `python -m` would look for modules in the current folder first, where this command does not
    os.execve(words[0], list(words), {**os.environ, "PYTHONSAFEPATH": "1"})


def _refuse_options(options: RunOptions) -> None:
    for field in dataclasses.fields(RunOptions):
        value = getattr(options, field.name)
        if field.name in OF_THE_LAB and value != field.default:
            raise InputError(f"{field.name} is {value!r}, which engine 'device' does not have: leave it out")


def _refuse_other(spec: TrainSpec, out: Path) -> None:
    """A program is not made anew for a run that goes on: what it was compiled for is what it trains."""
    before = settings(read_config(out / CONFIG))[0]
    different = differences(dataclasses.asdict(spec), dataclasses.asdict(before))
    if different:
        raise RunError(
            f"cannot resume {out}: it was made with other settings: {'; '.join(different)}; "
            "use the same ones, or another folder"
        )
