"""A run's options as a TOML file: what ``tinytl train --config`` reads, and what each run holds to be repeated from.

    photos = "photos"
    epochs = 5
    lr = 1e-3
    cache = "256MB"

Keys are the options' names, with dashes or underscores, in no tables. An option that is not there has its default; one
whose default is a value but which is to have none is ``"none"``. A relative path is relative to where the command is
started, as it is on the command line.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinytl._found import resolved
from tinytl._options import NONE, Option, check, near, options_of
from tinytl.errors import InputError
from tinytl.spec import FitOptions, RunOptions, TrainSpec

FILE = "config.toml"
MAX_BYTES = 1 << 20

OUT = Option("out", "str", "runs/train", "Folder for the run.")
GROUPS: dict[type, tuple[Option, ...]] = {kind: options_of(kind) for kind in (TrainSpec, FitOptions, RunOptions)}
OPTIONS: dict[str, Option] = {
    entry.name: entry for entry in (*(entry for group in GROUPS.values() for entry in group), OUT)
}
# options of one command and not of the run that it makes
_OF_THE_COMMAND = ("config", "resume", "quiet", "json")


def read_config(path: Path) -> dict[str, Any]:
    """Read a file's options, by name; each value is of its option's type and in its range.

    Raises InputError, naming the file and where it can the line, for a file that cannot be read, that is no TOML, or
    that holds an unknown key or a value that its option cannot have.
    """
    text = _read_text(Path(path))
    values: dict[str, Any] = {}
    for key, value in _parse(text, path).items():
        name = key.replace("-", "_")
        where = f"{path}{_line_of(text, key)}"
        if name in _OF_THE_COMMAND:
            raise InputError(f"{where}: {key!r} is an option of one command, not of a run: give it there as --{key}")
        if name not in OPTIONS:
            what = "a table" if isinstance(value, dict) else "an option"
            raise InputError(
                f"{where}: {key!r} is not {what} that is known: {near(name, OPTIONS)}see tinytl train --help"
            )
        if name in values:
            raise InputError(f"{where}: {key!r} is there twice, with a dash and with an underscore: leave one out")
        values[name] = _value(OPTIONS[name], value, where)
    return values


def settings(values: Mapping[str, Any]) -> tuple[TrainSpec, RunOptions]:
    """Make a run's specification and options of values by name; `out` is neither's and passed over.

    A `backbone` that is a search's folder gives way to the network that was found there (`tinytl._found`).

    Raises InputError when a value cannot be, or there are no photographs.
    """
    values = resolved(values)
    unknown = set(values) - set(OPTIONS)
    if unknown:
        name = min(unknown)
        raise InputError(f"{name!r} is no option of a run: {near(name, OPTIONS)}known: {', '.join(sorted(OPTIONS))}")
    if values.get("photos") is None:
        raise InputError('no photographs are given: tinytl train PHOTOS, or photos = "..." in the --config file')
    chosen = {
        kind: {entry.name: values[entry.name] for entry in group if entry.name in values}
        for kind, group in GROUPS.items()
    }
    spec = TrainSpec(**chosen[TrainSpec], fit=FitOptions(**chosen[FitOptions]))
    return spec, RunOptions(**chosen[RunOptions])


def config_text(spec: TrainSpec, options: RunOptions) -> str:
    """Every option of a run as TOML, each under its one-line help; `settings(read_config(...))` gives equal ones."""
    lines = [f"# Written by tinytl. Repeat the run with: tinytl train --config {FILE} --out FOLDER", ""]
    for kind, owner in ((TrainSpec, spec), (FitOptions, spec.fit), (RunOptions, options)):
        for entry in GROUPS[kind]:
            lines += [f"# {entry.help}", _line(entry, getattr(owner, entry.name)), ""]
    return "\n".join(lines)


def write_config(path: Path, spec: TrainSpec, options: RunOptions) -> None:
    """Write `config_text` to a file, whole or not at all. Raises RunError when it cannot be written."""
    from tinytl._atomic import write_bytes  # its module imports PyTorch, which completion must not wait for

    write_bytes(Path(path), config_text(spec, options).encode())


def _line(entry: Option, value: Any) -> str:
    if value is None:
        return f"# {entry.name} =" if entry.default is None else f'{entry.name} = "{NONE}"'
    if isinstance(value, str) and not _is_unicode(value):
        return f"# {entry.name}: {value!a} is no Unicode, so it cannot stand here: give it on the command line"
    return f"{entry.name} = {_toml(float(value) if entry.kind == 'float' else value)}"


def _toml(value: bool | int | float | str) -> str:
    """One value in TOML. Python's shortest text of a float reads back to the same bits, in TOML as in Python."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\u{ord(found[0]):04x}", escaped) + '"'


def _is_unicode(text: str) -> bool:
    # a file's name on Linux may hold bytes that are no UTF-8, which Python carries as lone surrogates
    return not re.search("[\ud800-\udfff]", text)


def _value(entry: Option, value: Any, where: str) -> Any:
    if entry.optional and value == NONE:
        return None
    if type(value) is int and entry.kind == "float":
        value = float(value)
    try:
        check(entry, value)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return value


def _read_text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; check --config") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} holds more than {MAX_BYTES} bytes: that is no configuration; check --config")
    try:
        return data.decode("utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text, which TOML is: check --config") from error


def _parse(text: str, path: Path) -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return toml.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise InputError(f"{path} is no TOML: {' '.join(str(error).split())}") from error


def _line_of(text: str, key: str) -> str:
    """Where a key stands, as an error tells it; nothing where it is written in a way that this does not read."""
    pattern = re.compile(rf"""\s*(?:\[+\s*)?(["']?){re.escape(key)}\1\s*[=.\]]""")
    number = next((number for number, line in enumerate(text.split("\n"), 1) if pattern.match(line)), None)
    return "" if number is None else f", line {number}"
