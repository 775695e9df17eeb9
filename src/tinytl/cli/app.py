"""The application: its commands, and what happens to errors."""

from __future__ import annotations

import sys

import typer

from tinytl.errors import InputError, TinyTLError

from . import infer, listing, profile, train

app = typer.Typer(
    name="tinytl",
    help="Fine-tune a pretrained vision network inside the memory you have; every byte it claims is measured.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("evaluate")(infer.evaluate)
app.command("predict")(infer.predict)
app.command("profile")(profile.profile)
app.command("backbones")(listing.backbones)
app.command("methods")(listing.methods)


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted; a bug shows its traceback."""
    try:
        app()
    except InputError as error:
        print(f"tinytl: {error}", file=sys.stderr)
        sys.exit(2)
    except TinyTLError as error:
        print(f"tinytl: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("tinytl: interrupted; a training run goes on with --resume", file=sys.stderr)
        sys.exit(130)
