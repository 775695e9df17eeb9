"""A log of JSON lines that a killed process leaves whole: each line is on the disk before it counts as done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinytl.errors import RunError


class Lines:
    """Lines of a file, read once and appended to.

    Args:
        path: of the file; made when the first line is appended. A last line that is cut short is taken off.

    Raises:
        RunError: the file cannot be read, or holds anything but such lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: list[dict[str, Any]] = []
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from error
        whole = data[: data.rfind(b"\n") + 1]
        try:
            self.entries = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise RunError(f"{path} is damaged: remove it to measure anew what it held") from error
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write a line and wait until it is on the disk. Raises RunError where it cannot be written."""
        try:
            with open(self._path, "ab") as file:
                file.write(json.dumps(dict(entry)).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}") from error
        self.entries.append(dict(entry))
