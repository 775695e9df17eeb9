"""The application: its commands, and what happens to errors."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tinytl import __version__
from tinytl._options import near
from tinytl.errors import InputError, Interrupted, TinyTLError, UnknownNameError, UnsupportedLayerError

from . import bench, compile, doctor, infer, inspect, listing, profile, report, search, supernet, table, train

DONE, BUG, BAD_INPUT, INTERRUPTED, TERMINATED, NO_READER = 0, 1, 2, 130, 143, 141
PROGRAM = "tinytl"
# Releases of typer stand on the package `click`, or hold a copy of it: the error of a wrong usage is this class in both
UsageError: Any = typer.BadParameter.__bases__[0]


class Commands(TyperGroup):
    """The commands by name, in the order in which they are needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, as they were added."""
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Look up a command. Raises UnknownNameError, with near misses, where there is none."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise UnknownNameError("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name=PROGRAM,
    cls=Commands,
    help="Fine-tune a pretrained vision network inside the memory you have; every byte it claims is measured.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("evaluate")(infer.evaluate)
app.command("predict")(infer.predict)
app.command("compile")(compile.compile_command)
app.command("inspect")(inspect.inspect_command)
app.command("report")(report.report)
app.command("search")(search.search)
app.command("supernet")(supernet.supernet)
app.command("profile")(profile.profile)
app.command("table")(table.table)
app.add_typer(bench.app, name="bench")
app.command("backbones")(listing.backbones)
app.command("methods")(listing.methods)
app.command("doctor")(doctor.doctor)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, on ``sys.argv`` or on ``arguments``, and exit.

    Exit status: 0 done; 2 for what the user can mend (input, a full disk, a rate at which the loss is not finite), with
    one line on stderr; 1 for what only we can; 130 and 143 where Ctrl-C or SIGTERM ended it; 141 where the reader of a
    pipe went away. A bug shows its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold what the terminal cannot show
    try:
        status = _status(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # what is still in the buffer goes nowhere, and Python should not stumble over it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = NO_READER
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        status = NO_READER  # rich saw it first, and has seen to the buffer
    sys.exit(status)


def _status(arguments: list[str]) -> int:
    if f"_{PROGRAM.upper()}_COMPLETE" in os.environ:
        app(arguments, prog_name=PROGRAM)  # a shell asks what could stand next; this exits
    command = typer.main.get_command(app)
    # what Pillow warns of (a broken EXIF block, a bomb) is dealt with; it would stand beside the one line that says so
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with command.make_context(PROGRAM, arguments) as context:
            command.invoke(context)
        return DONE
    except typer.Exit as stop:
        return stop.exit_code
    except UsageError as error:
        return _refused(_usage(error, command, arguments), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return _refused("interrupted", INTERRUPTED)
    except Interrupted as error:
        return _refused(str(error), error.exit_status)
    except (InputError, UnsupportedLayerError) as error:
        return _refused(str(error), BAD_INPUT)
    except TinyTLError as error:
        return _refused(str(error), BUG)


def _refused(message: str, status: int) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return status


def _usage(error: Any, group: Any, arguments: list[str]) -> str:
    """A wrong usage in one line, with the near miss of an option that there is not."""
    name = next((word for word in arguments if word in group.commands), None)
    command, path = (group, PROGRAM) if name is None else (group.commands[name], f"{PROGRAM} {name}")
    if type(error).__name__ == "NoSuchOption":
        known = [flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
        return f"no option {error.option_name!r}: {near(error.option_name, known)}see {path} --help"
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]}; see {path} --help"
