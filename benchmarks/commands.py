"""Put every command's options into docs/cli.md, between its markers: `python -m benchmarks.commands`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from tinytl.cli.app import app
from tinytl.report import Column, markdown

PAGE = Path("docs/cli.md")


def _leaves(commands: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its whole name: of a group, those in it."""
    for name, command in commands.items():
        inner = getattr(command, "commands", None)
        yield from [(before + name, command)] if inner is None else _leaves(inner, f"{before}{name} ")


COMMANDS = dict(_leaves(typer.main.get_command(app).commands))  # pyright: ignore[reportAttributeAccessIssue]


def options_table(command: Any) -> str:
    """A command's arguments and options in Markdown: how each is spelled, its default, what it is."""
    rows = [
        {"flags": _spelled(parameter), "default": _default(parameter), "help": parameter.help or ""}
        for parameter in command.params
    ]
    return markdown(rows, [Column("flags", "option"), Column("default", "default"), Column("help", "what it is")])


def _spelled(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name).upper()}`"
    return ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    if parameter.default is None or parameter.default == () or parameter.required:
        return ""
    if isinstance(parameter.default, bool):
        flags = parameter.opts if parameter.default else parameter.secondary_opts
        return f"`{flags[0]}`" if flags else ""
    return f"`{parameter.default}`"


def filled(text: str) -> str:
    """The page with its tables made from the commands."""
    for name, command in COMMANDS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        table = options_table(command)
        text, count = re.subn(pattern, lambda found, table=table: found[1] + table + found[2], text, flags=re.S)
        if count != 1:
            raise ValueError(f"{PAGE} has no place for the command {name}")
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
