"""The commands of `python -m tinytl.runtime`: options, what is printed, and the exit status.

0 done; 2 for what the user can mend, with one line on stderr; 1 for what only we can; 130 and 143 where Ctrl-C or
SIGTERM ended it; 141 where the reader of a pipe went away. A bug shows its traceback.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tinytl.errors import DataError, InputError, Interrupted, TinyTLError, one_line

from .process import hold_little

DONE, BUG, BAD_INPUT, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141
PROGRAM = "tinytl"

# what trains is imported inside the commands: --help answers at once


class _Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def _get_formatter(self) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(self.prog, width=100)  # to ask for the terminal's brings 0.6 MB of modules

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command, of ``sys.argv`` or of ``arguments``, and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what the terminal cannot show
    # what Pillow warns of (a broken EXIF block, a bomb) is dealt with; it would stand beside the line that says so
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        status = _status(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # what is still in the buffer goes nowhere, and Python should not stumble over it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = NO_READER
    sys.exit(status)


def _status(arguments: list[str]) -> int:
    try:
        options = _parser().parse_args(arguments)
        hold_little()
        options.command(options)
        return DONE
    except KeyboardInterrupt:
        return _refused("interrupted", INTERRUPTED)
    except Interrupted as error:
        return _refused(str(error), error.exit_status)
    except InputError as error:
        return _refused(str(error), BAD_INPUT)
    except TinyTLError as error:
        return _refused(str(error), BUG)


def _refused(message: str, status: int) -> int:
    print(f"{PROGRAM}: {one_line(' '.join(message.split()))}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python -m {PROGRAM}.runtime",
        description="Train a network on the device that uses it, from a compiled program; neither PyTorch nor numpy.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(prog=parser.prog, required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(command=run)
        added.add_argument("program", metavar="PROGRAM", help="Program file, such as tinytl compile writes.")
        return added

    _train_options(command("train", _train, "Train on photographs and leave the run in a folder."))
    for name, run, what, text in (
        ("evaluate", _evaluate, "photos", "Measure what was learned on photographs; give it some it has not seen."),
        ("predict", _predict, "images", "Label photographs, with probabilities."),
    ):
        added = command(name, run, text)
        if what == "photos":
            added.add_argument("photos", metavar="PHOTOS", help="Folder ROOT/CLASS/*.jpg, or a data set.")
        else:
            added.add_argument("images", metavar="IMAGES", nargs="+", help="Photographs, or folders of some.")
            added.add_argument("--top", type=_whole(1), default=3, help="Labels to show of each (3).")
        added.add_argument("--run", metavar="RUN", help="A run's folder or a delta; else the untrained program.")
        _common_options(added)
    info = command("info", _info, "Say what a program is.")
    info.add_argument("--json", action="store_true", help="Print JSON, and nothing else, on stdout.")
    return parser


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", metavar="PHOTOS", help="Folder ROOT/CLASS/*.jpg, one with train/ and val/, or elpv.")
    parser.add_argument("--out", default="runs/train", help="Folder for the run (runs/train).")
    parser.add_argument("--resume", action="store_true", help="Go on with the run in the folder --out.")
    own = parser.add_argument_group("how it is trained; by default as the program was compiled")
    for name, read, text in (
        ("epochs", _whole(1), "Passes over the training photographs."),
        ("lr", _number, "Peak learning rate of the cosine."),
        ("warmup-epochs", _whole(0), "Epochs of linear warm-up; they count among the epochs."),
        ("seed", _whole(0), "Of every random draw."),
        ("val-fraction", _number, "Share of each class held out, unless the folder has its own split."),
        ("split-seed", _whole(0), "Of the choice of what is held out."),
        ("min-scale", _number, "Smallest share of a photograph's area in a training crop."),
    ):
        own.add_argument(f"--{name}", type=read, help=text)
    for name, text in (("flip", "Mirror training images at random."), ("color", "Distort brightness and saturation.")):
        own.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
    parser.add_argument("--checkpoint-steps", type=_whole(1), help="Write a checkpoint every so many steps.")
    parser.add_argument(
        "--checkpoint-seconds", type=_seconds, default=60.0, help="Write one every so many seconds (60), or none."
    )
    _common_options(parser)


def _common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_whole(1), help="Threads that compute; by default the program's own.")
    parser.add_argument("--strict", action="store_true", help="Refuse photographs that cannot be read.")
    parser.add_argument("--json", action="store_true", help="Print JSON, and nothing else, on stdout.")
    parser.add_argument("--quiet", "-q", action="store_true", help="Print the result only: no progress, no notes.")


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least {least}")
        return value

    return read


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number") from error


def _seconds(text: str) -> float | None:
    if text.strip().lower() == "none":
        return None
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0, or none")
    return value


def _train(options: argparse.Namespace) -> None:
    from .executor import Executor
    from .settings import Settings
    from .show import Display, result_record, summary
    from .training import Intervals, train

    given = {name: getattr(options, name) for name in Settings._fields if getattr(options, name) is not None}
    display = Display(quiet=options.quiet or options.json)
    with Executor(options.program, options.threads or 0) as machine:
        try:
            result = train(
                machine,
                Path(options.program),
                options.photos,
                Path(options.out),
                given=given,
                intervals=Intervals(options.checkpoint_steps, options.checkpoint_seconds),
                resume=options.resume,
                strict=options.strict,
                shown=display,
            )
        finally:
            display.clear()
    if options.json:
        _print_json(result_record(result, display.notes))
        return
    for line in summary(result):
        print(one_line(line))


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluation import evaluate, finite
    from .photos import to_evaluate
    from .show import Display

    display = Display(quiet=options.quiet or options.json)
    with _opened(options) as (machine, recipe, classes):
        photos = to_evaluate(options.photos, classes, strict=options.strict, on_check=display.check)
        display.clear()
        for note in photos.notes:
            display.notice(note)
        found = finite(evaluate(machine, recipe, photos))
    if options.json:
        _print_json({**found.record(), "classes": list(classes), "notes": display.notes})
        return
    print(
        f"top-1 {found.top1:.1%}, balanced {found.balanced_accuracy:.1%} (largest class alone: "
        f"{found.majority_share:.1%}), loss {found.loss:.3f} on {found.images} photographs"
    )


def _predict(options: argparse.Namespace) -> None:
    from .answers import label
    from .show import print_note

    with _opened(options) as (machine, recipe, classes):
        found = label(machine, recipe, classes, options.images, options.top, strict=options.strict)
    if options.json:
        _print_json(found.answers)
    else:
        for note in found.notes if not options.quiet else ():
            print_note(note)
        for answer in found.answers:
            if "labels" in answer:
                labels = "  ".join(f"{label['label']} {label['probability']:.1%}" for label in answer["labels"])
                print(one_line(f"{answer['image']}: {labels}"))
    if found.bad:  # the others are labelled; the exit status tells that not all are
        first, *others = found.bad
        raise DataError(f"{first} (and {len(others)} more)" if others else str(first))


def _info(options: argparse.Namespace) -> None:
    from .executor import Executor
    from .judge import judged
    from .show import described

    with Executor(options.program) as machine:
        meta = machine.meta
        if "delta" in meta:  # else it is a step by itself, which only `train` and the like refuse
            judged(meta, machine)
        if not options.json:
            print(one_line(described(machine)))
            return
        numbers = ("batch", "micro_batch", "classes", "height", "width", "threads", "arena_bytes", "state_bytes")
        record: dict[str, Any] = {name: getattr(machine, name) for name in numbers}
        record |= {name: meta[name] for name in ("delta", "train", "plan") if name in meta}
        _print_json(record)


class _opened:
    """A program with what a run has learned, open for the length of the block."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options

    def __enter__(self) -> tuple[Any, Any, tuple[str, ...]]:
        from .delta import delta_in, read_delta
        from .executor import Executor
        from .judge import judged
        from .machine import program_file
        from .pixels import Recipe

        self._machine = Executor(self._options.program, self._options.threads or 0)
        try:
            meta = self._machine.meta
            classes = judged(meta, self._machine)
            if self._options.run is not None:
                program = program_file(Path(self._options.program))
                read_delta(delta_in(Path(self._options.run)), self._machine, program)
            return self._machine, Recipe(meta["delta"]["preprocessing"]), classes
        except BaseException:
            self._machine.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._machine.close()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
