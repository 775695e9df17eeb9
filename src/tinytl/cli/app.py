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
    """Run the command line.

    Exit status: 0 done; 2 for what the user can mend (input, a full disk, a rate at which the loss is not finite), with
    one line on stderr; 1 for what only we can; 130 interrupted. A bug shows its traceback.
    """
    try:
        app()
    except InputError as error:
        print(f"tinytl: {error}", file=sys.stderr)
        sys.exit(2)
    except TinyTLError as error:
        print(f"tinytl: {error}", file=sys.stderr)
        sys.exit(1)
