"""What a command prints: results on stdout, notes and errors on stderr, tables through rich."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from tinytl.errors import one_line

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only: no progress, no notes.")]


def print_line(text: str, console: Console | None = None) -> None:
    """Print a line as it is: not broken, and nothing in it read as markup or highlighted."""
    (console or Console()).print(one_line(text), soft_wrap=True, markup=False, highlight=False, emoji=False)


def print_json(value: Any) -> None:
    """Print a result as JSON. NaN and infinity, which JSON does not have, raise ValueError."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_note(text: str) -> None:
    """Print what the user should know, on stderr."""
    print(f"note: {one_line(text)}", file=sys.stderr)
