"""The options of a run, made from the fields of `tinytl.spec`: name, type, default and help stand there alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any

import typer

from tinytl._options import Option, parse
from tinytl.config import GROUPS, OPTIONS, OUT
from tinytl.spec import FitOptions, RunOptions, TrainSpec

from . import completion

HEADINGS = {
    TrainSpec: "What is learned from what",
    FitOptions: "How it is trained",
    RunOptions: "How it is carried out",
}
METAVARS = {"int": "INTEGER", "float": "NUMBER", "str": "TEXT", "bytes": "SIZE", "bool": None}


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every option of a run; see `with_options`."""
    return with_options(*OPTIONS)(command)


def with_options(
    *names: str, groups: Mapping[str, Sequence[Option]] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options of a run, or all those of ``groups``, by the heading that they stand under.

    It is called with ``given``, the values of those that were typed, by name, and with its own parameters by name. A
    value is read here and not by the parser of the command line, so that a bad one is refused in the same words
    wherever it stands.
    """

    shown = _of_a_run() if groups is None else groups
    known = {entry.name: entry for entries in shown.values() for entry in entries}
    wanted = names if groups is None else tuple(known)

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "given"]

        def run(ctx: typer.Context, **values: Any) -> None:
            typed = {name for name in values if _was_typed(ctx, name)}
            given = {name: parse(known[name], values[name]) for name in wanted if name in typed}
            command(given=given, **{p.name: values[p.name] for p in own})

        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        made = [
            _parameter(entry, heading)
            for heading, entries in shown.items()
            for entry in entries
            if entry.name in wanted
        ]
        # an argument of the command's own is what stands first on the line
        first = [p for p in keywords if not made or known[made[0].name].default is not MISSING]
        parameters = [context, *first, *made, *(p for p in keywords if p not in first)]
        run.__doc__ = command.__doc__
        # both: releases of typer read the one or the other
        run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorated


def _was_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _of_a_run() -> dict[str, Sequence[Option]]:
    shown: dict[str, Sequence[Option]] = {heading: GROUPS[kind] for kind, heading in HEADINGS.items()}
    return shown | {HEADINGS[RunOptions]: (*GROUPS[RunOptions], OUT)}


def _parameter(entry: Option, heading: str) -> inspect.Parameter:
    names = completion.NAMES.get(entry.name, ())
    about: dict[str, Any] = {"help": entry.help, "rich_help_panel": heading}
    if entry.kind == "bool":
        flag = f"{entry.flag}/--no-{entry.flag[2:]}"
        return _keyword(entry.name, bool, typer.Option(entry.default, flag, **about))
    about["metavar"] = METAVARS[entry.kind]
    if entry.default is MISSING:
        del about["rich_help_panel"]
        about["metavar"] = entry.name.upper()
        about["autocompletion"] = completion.names(*completion.DATASETS)
        return _keyword(entry.name, str | None, typer.Argument(None, show_default=False, **about))
    if names:
        about["autocompletion"] = completion.names(*names)
    default = None if entry.default is None else str(entry.default)
    return _keyword(entry.name, str | None, typer.Option(default, entry.flag, **about))


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
